"""Whatever answers: a local engine, an endpoint, a script.

A policy continues a conversation. One that samples here gives token ids and
log-probabilities, and the conversation keeps them as they are; one behind an
API gives a message (`endpoint.py`).
"""

from collections.abc import Awaitable, Callable, Sequence
import dataclasses
from typing import Any, Protocol

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import token_stream
from dsv32_jax.data import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """A reply: either tokens or a message.

  Attributes:
    finish_reason: "stop", or "length" where it was cut off.
    token_ids: as drawn, eos included; None where there is a message.
    logprobs: of each; None where unknown.
    message: in the form of the OpenAI API; None where there are tokens.
    num_prompt_tokens: that the model read.
    num_written_tokens: that it wrote.
    record: what else the sampler gave, for the learner.
  """

  finish_reason: str
  token_ids: tuple[int, ...] | None = None
  logprobs: tuple[float, ...] | None = None
  message: dict[str, Any] | None = None
  num_prompt_tokens: int = 0
  num_written_tokens: int = 0
  record: Any = None

  def __post_init__(self):
    if self.finish_reason not in ("stop", "length"):
      raise ValueError(f"{self.finish_reason=} must be stop or length")
    if (self.token_ids is None) == (self.message is None):
      raise ValueError("a completion has either token_ids or a message")

  def add_to(self, conversation: conversations.Conversation) -> dict[str, Any]:
    """Adds the reply to the conversation it continues; returns the message."""
    if self.message is not None:
      conversation.add(self.message)
      return dict(self.message)
    return conversation.add_completion(
      self.token_ids, self.logprobs, self.record
    )


class Policy(Protocol):
  """Continues conversations, any number of them at the same time.

  Attributes:
    tokenizer: of conversations it is to continue; None behind an API.
  """

  tokenizer: tokenizers.Tokenizer | None

  async def complete(
    self, conversation: conversations.Conversation, *, max_tokens: int
  ) -> Completion:
    """Returns a reply without adding it.

    Cancelling the call gives up the reply.

    Args:
      conversation: at a point where it awaits the model.
      max_tokens: of the reply.
    """


class Sampled(Protocol):
  """What a sampler returns; `generation.requests.Completion` is one."""

  token_ids: Sequence[int]
  logprobs: Sequence[float]
  finish_reason: str


class TokenPolicy:
  """A sampler of token ids: the local engine, or any other."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    sample: Callable[[list[int], int], Awaitable[Sampled]],
  ):
    """Takes a sampler.

    Args:
      tokenizer: of the model.
      sample: coroutine function of prompt ids and the most tokens to draw;
        `functools.partial` binds temperature and the like. What it returns
        becomes the record of the completion.
    """
    self.tokenizer = tokenizer
    self._sample = sample

  async def complete(
    self, conversation: conversations.Conversation, *, max_tokens: int
  ) -> Completion:
    """See Policy; RuntimeError if the sampler gave up."""
    prompt = conversation.prompt_ids()
    sampled = await self._sample(prompt, max_tokens)
    if sampled.finish_reason not in ("stop", "length"):
      raise RuntimeError(f"the sampler ended with {sampled.finish_reason=}")
    return Completion(
      finish_reason=sampled.finish_reason,
      token_ids=tuple(sampled.token_ids),
      logprobs=tuple(sampled.logprobs),
      num_prompt_tokens=len(prompt),
      num_written_tokens=len(sampled.token_ids),
      record=sampled,
    )


async def ask(policy: Policy, text: str, *, max_tokens: int = 4096) -> str:
  """Returns the content of a policy's reply to one message of a user."""
  conversation = conversations.Conversation(policy.tokenizer, "chat")
  conversation.add({"role": "user", "content": text})
  reply = await policy.complete(conversation, max_tokens=max_tokens)
  return reply.add_to(conversation).get("content") or ""


Reply = str | chat.Message
Script = Callable[[list[dict[str, Any]]], Reply]


class ScriptedPolicy:
  """Says what a function of the messages says: heuristics, tests, replays.

  A reply is an assistant message, or raw text as a model would write it, eos
  included, well-formed or not. With a tokenizer it is given as tokens of
  log-probability 0, cut off at max_tokens.
  """

  def __init__(self, script: Script, tokenizer=None):
    """Takes the function; `replies` makes one of a list."""
    self.tokenizer = tokenizer
    self._script = script

  async def complete(
    self, conversation: conversations.Conversation, *, max_tokens: int
  ) -> Completion:
    """See Policy."""
    reply = self._script(conversation.messages)
    mode = conversation.thinking_mode
    if self.tokenizer is None:
      if isinstance(reply, str):
        reply = chat.parse_message_from_completion_text(reply, mode)
      return Completion(finish_reason="stop", message=dict(reply))
    if isinstance(reply, str):
      ids = self.tokenizer.encode_rendered(reply)
    else:
      context = [{"role": "user", "content": ""}]
      pieces = chat.render([reply], mode, context=context)
      stream = token_stream.TokenStream(
        self.tokenizer, [token_stream.Piece(text=piece) for piece in pieces]
      )
      ids = stream.token_ids()
    cut = ids[:max_tokens]
    return Completion(
      finish_reason="stop" if len(cut) == len(ids) else "length",
      token_ids=tuple(cut),
      logprobs=(0.0,) * len(cut),
      num_prompt_tokens=conversation.num_tokens,
      num_written_tokens=len(cut),
    )


def replies(*items: Reply) -> Script:
  """Makes a script that says one thing after the other.

  It counts the assistant messages of the conversation, so that one script
  serves any number of conversations.
  """

  def script(messages):
    said = sum(message["role"] == "assistant" for message in messages)
    if said >= len(items):
      raise ValueError(f"the script has {len(items)} replies, asked for more")
    return items[said]

  return script


def call(name: str, arguments: str, *, reasoning: str = "") -> dict[str, Any]:
  """Makes the assistant message of a single tool call.

  Args:
    name: of the tool.
    arguments: JSON text.
    reasoning: thinking before it.
  """
  function = {"name": name, "arguments": arguments}
  return {
    "role": "assistant",
    "content": "",
    "reasoning_content": reasoning,
    "tool_calls": [{"type": "function", "function": function}],
  }
