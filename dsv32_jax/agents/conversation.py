"""A conversation as the tokens that the sampler sees, saw and drew.

Tokens in, tokens out: what a model drew is kept as it was drawn and never
tokenised again. Text of the format becomes special tokens; what users, tools
or messages contain is text, even where it spells a special token.

Whatever changes the past (a new user message, which drops earlier thinking, or
context management) begins a new part. In a part the past only ever grew, so
every token drawn in it had exactly the tokens before it as its context, and a
learner may train on it in one pass.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
from typing import Any

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.agents import token_stream
from dsv32_jax.data import tokenizer as tokenizers

_OPENERS = ("user", "developer")
_BOS = token_stream.Piece(text=chat_format.BOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turn:
  """A message and, where a sampler drew it, its tokens."""

  message: dict[str, Any]
  # As drawn, the same behind the thinking, and the text with eos.
  drawn_ids: tuple[int, ...] | None = None
  answer_ids: tuple[int, ...] | None = None
  logprobs: tuple[float, ...] = ()
  text: str = ""
  # Calls that results may follow; a malformed reply counts as one.
  num_calls: int = 0

  @property
  def is_result(self) -> bool:
    return self.message.get("role") == "tool"


class Conversation:
  """Messages and their tokens, growing at the end.

  Attributes:
    thinking_mode: "thinking" or "chat".
  """

  def __init__(
    self, tokenizer: tokenizers.Tokenizer | None, thinking_mode: str
  ):
    """Begins an empty conversation.

    Args:
      tokenizer: None where the model is reached by messages alone; there are
        then no tokens to ask for.
      thinking_mode: "thinking" or "chat".

    Raises:
      ValueError: no such mode.
    """
    self._thinking = chat.is_thinking(thinking_mode)
    self.thinking_mode = thinking_mode
    self._tokenizer = tokenizer
    self._turns: list[_Turn] = []
    self._closed: list[token_stream.Part] = []
    self._stream = token_stream.TokenStream(tokenizer, [_BOS])

  @property
  def messages(self) -> list[dict[str, Any]]:
    """The messages so far, tokens left aside.

    A reply that is not of the format has its text as content and the reason
    under "malformed".
    """
    return [dict(turn.message) for turn in self._turns]

  @property
  def token_ids(self) -> list[int]:
    """All tokens of the current part, whoever's turn it is."""
    return self._stream.token_ids()

  @property
  def num_tokens(self) -> int:
    """Length of what the sampler would see now."""
    return len(self._stream)

  @property
  def num_results_missing(self) -> int:
    """Results of tool calls that must come before the model's next turn."""
    order, calls = _results(self._turns)
    return calls - order

  @property
  def awaits_model(self) -> bool:
    """Whether the tokens end where a reply begins."""
    if not self._turns:
      return False
    role = self._turns[-1].message["role"]
    return role in _OPENERS or (role == "tool" and not self.num_results_missing)

  def add(self, message: chat.Message, *, written: bool = False) -> None:
    """Adds a message; a user's drops the thinking before it.

    Args:
      message: in the form of the OpenAI API.
      written: whether an assistant message counts as drawn by the model, as in
        supervised fine-tuning.

    Raises:
      ValueError: the message has no rendering at this place; the conversation
        is as it was.
    """
    turn = _Turn(message=dict(message))
    if written and turn.message.get("role") != "assistant":
      raise ValueError(f"{written=} is for assistant messages")
    if turn.message.get("role") == "assistant":
      calls = len(chat.tool_calls(turn.message))
      turn = dataclasses.replace(turn, num_calls=calls)
    order, calls = _results(self._turns)
    pieces = self._render(turn, current=True, result=(order + 1, calls))
    token_stream.require_unicode(pieces)
    is_opener = turn.message["role"] in _OPENERS
    begun = any(x.message["role"] != "system" for x in self._turns)
    if self._thinking and is_opener and begun:
      self._begin_part([*self._turns, turn])
    else:
      self._turns.append(turn)
      self._stream.append(
        dataclasses.replace(piece, written=written) for piece in pieces
      )

  def prompt_ids(self) -> list[int]:
    """Returns the tokens that the model is to continue.

    Raises:
      ValueError: it is not the model's turn, or there is no tokenizer.
    """
    self._require_turn()
    return self._stream.token_ids()

  def add_completion(
    self,
    token_ids: Sequence[int],
    logprobs: Sequence[float] | None = None,
    record: Any = None,
  ) -> dict[str, Any]:
    """Adds what a sampler drew behind `prompt_ids`.

    Args:
      token_ids: as drawn. Where eos is missing, the format's is added.
      logprobs: of each; None counts as 0.
      record: anything of the sampler's, for `Part.records`.

    Returns:
      The message. Where the text is not of the format, its content is all of
      the text and "malformed" says why; one tool message may answer it.

    Raises:
      ValueError: not the model's turn, ids outside the vocabulary, or
        logprobs of another number.
    """
    self._require_turn()
    ids = tuple(int(token_id) for token_id in token_ids)
    text = self._tokenizer.decode(ids)
    if logprobs is None:
      logprobs = (0.0,) * len(ids)
    if len(logprobs) != len(ids):
      raise ValueError(f"{len(logprobs)=} differs from {len(ids)=}")
    ended = bool(ids) and ids[-1] == self._tokenizer.eos_id
    if not ended:
      text += chat_format.EOS
    try:
      message = chat.parse_message_from_completion_text(
        text, self.thinking_mode
      )
      num_calls = len(message["tool_calls"])
    except ValueError as error:
      message = {
        "role": "assistant",
        "content": text.removesuffix(chat_format.EOS),
        "malformed": str(error),
      }
      num_calls = 1
    turn = _Turn(
      message=message,
      drawn_ids=ids,
      answer_ids=self._behind_thinking(ids, text),
      text=text,
      logprobs=tuple(float(x) for x in logprobs),
      num_calls=num_calls,
    )
    self._stream.token_ids()  # what the sampler saw stays as it was
    self._stream.append(self._render(turn, current=True, written=True))
    self._stream.add_record(record)
    self._turns.append(turn)
    return dict(message)

  def keep(
    self,
    indices: Sequence[int],
    replacements: Mapping[int, chat.Message] | None = None,
  ) -> None:
    """Forgets all other messages, which begins a new part.

    Args:
      indices: of messages, ascending. Calls and their results stay together.
      replacements: other messages in the place of some that stay.

    Raises:
      ValueError: the rest would not be a conversation; it is as it was.
    """
    turns = []
    for index in indices:
      turn = self._turns[index]
      if replacements and index in replacements:
        turn = _Turn(message=dict(replacements[index]))
      order, calls = _results(turns)
      if turn.is_result and order >= calls:
        raise ValueError(f"message {index} is a result without its call")
      turns.append(turn)
    self._begin_part(turns)

  def parts(self) -> list[token_stream.Part]:
    """Returns the parts in which the model drew anything, in order."""
    last = self._stream.part()
    return [*self._closed, *([last] if last else [])]

  def fork(self) -> "Conversation":
    """Returns a conversation that goes on from here by itself."""
    other = copy.copy(self)
    other._turns, other._closed = list(self._turns), list(self._closed)
    other._stream = self._stream.fork()
    return other

  def _begin_part(self, turns: list[_Turn]) -> None:
    """Puts turns in the place of all, which changes the past."""
    last_user = chat.last_user_index([turn.message for turn in turns])
    pieces, order = [_BOS], 0
    for index, turn in enumerate(turns):
      order = order + 1 if turn.is_result else 0
      if not order:
        num_calls = turn.num_calls
      result = (order, num_calls)
      pieces += self._render(turn, current=index >= last_user, result=result)
    token_stream.require_unicode(pieces)
    part = self._stream.part()
    self._closed += [part] if part else []
    self._turns = turns
    self._stream = token_stream.TokenStream(self._tokenizer, pieces)

  def _render(self, turn, *, current, result=(0, 0), written=False):
    """Returns the pieces of a turn."""
    role = turn.message.get("role")
    if self._tokenizer is None and role == "assistant":
      # What a server took for a reply need not have a rendering here.
      return []
    if turn.drawn_ids is None:
      texts = chat.render_message(
        turn.message, thinking=self._thinking, current=current, result=result
      )
      return [token_stream.Piece(text=text) for text in texts]
    if current or not self._thinking:
      ids = turn.drawn_ids
    else:
      ids = turn.answer_ids
    if ids is None:
      behind = turn.text.partition(chat_format.THINK_END)[2]
      pieces = [token_stream.Piece(text=behind.removesuffix(chat_format.EOS))]
    else:
      logprobs = turn.logprobs if written else None
      pieces = [
        token_stream.Piece(token_ids=ids, written=written, logprobs=logprobs)
      ]
    if not ids or ids[-1] != self._tokenizer.eos_id:
      pieces.append(token_stream.Piece(text=chat_format.EOS))
    return pieces

  def _behind_thinking(self, ids, text) -> tuple[int, ...] | None:
    """The tokens that stay once the thinking is dropped; None: not known."""
    end_id = self._tokenizer.special_id("think_end")
    thinking = text.partition(chat_format.THINK_END)[0]
    if end_id not in ids:
      # Without an end all of it is thinking.
      return () if thinking == text else None
    place = ids.index(end_id)
    if self._tokenizer.decode(ids[:place]) != thinking:
      return None
    return ids[place + 1 :]

  def _require_turn(self) -> None:
    if self._tokenizer is None:
      raise ValueError("a conversation without a tokenizer has no tokens")
    if not self.awaits_model:
      raise ValueError("it is not the model's turn")


def _results(turns: Sequence[_Turn]) -> tuple[int, int]:
  """Results at the end of the turns, and calls that they may answer."""
  order = 0
  for turn in reversed(turns):
    if not turn.is_result:
      return order, turn.num_calls
    order += 1
  return order, 0
