"""Text of tokens as they come: whole characters, nothing past a stop string."""

from collections.abc import Callable, Sequence

from dsv32_jax.data import tokenizer as tokenizers

BROKEN = "\ufffd"
_MOST_PENDING = 8


def decode(tokenizer: tokenizers.Tokenizer, token_ids: Sequence[int]) -> str:
  """Returns the text of ids, of which a model may have more than a tokenizer.

  Embedding tables are padded; what no token has the id of reads as U+FFFD.
  """
  known, text = [], []
  for token_id in token_ids:
    if token_id < tokenizer.vocab_size:
      known.append(token_id)
    else:
      text += [tokenizer.decode(known), BROKEN]
      known = []
  return "".join([*text, tokenizer.decode(known)])


class TextStream:
  """Turns the tokens of one answer into text that never has to be unsaid.

  Attributes:
    stopped: whether a stop string was met; all that follows is dropped.
  """

  def __init__(
    self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()
  ):
    """Starts an answer.

    Args:
      decode: token ids to text, the text of byte pieces joined; bytes that
        are no character, or not yet one, read as U+FFFD.
      stop: strings that end the text and are left out of it.

    Raises:
      ValueError: a stop string is empty.
    """
    if "" in stop:
      raise ValueError(f"{stop=} must hold non-empty strings")
    self.stopped = False
    self._decode, self._stop = decode, tuple(stop)
    self._pending: list[int] = []
    self._num_sent = 0  # characters of the pending tokens that are out
    self._held = ""

  def push(self, token_id: int) -> str:
    """Returns the text that is certain with this token."""
    if self.stopped:
      return ""
    self._pending.append(token_id)
    text = self._decode(self._pending)
    # The last character may be the beginning of one that comes.
    whole = text[:-1] if text.endswith(BROKEN) else text
    fresh = whole[self._num_sent :]
    if whole == text:
      self._pending, self._num_sent = [], 0
    else:
      self._num_sent = len(whole)
      self._shorten(text)
    return self._release(fresh)

  def _shorten(self, text: str) -> None:
    """Lets go of tokens that no character which is yet to come is part of.

    Text may go on being broken for ever, or hold U+FFFD itself: decoding all
    that is pending again and again would take ever longer.
    """
    if len(self._pending) <= _MOST_PENDING:
      return
    # A character has four bytes at most, a token at least one.
    for count in range(4, _MOST_PENDING):
      head = self._decode(self._pending[:-count])
      if head + self._decode(self._pending[-count:]) == text:
        self._pending = self._pending[-count:]
        self._num_sent -= len(head)
        return

  def finish(self) -> str:
    """Returns what was held back; the answer is over."""
    if self.stopped:
      return ""
    rest = self._decode(self._pending)[self._num_sent :]
    out = self._release(rest)
    held, self._held, self._pending = self._held, "", []
    return out if self.stopped else out + held

  def _release(self, fresh: str) -> str:
    text = self._held + fresh
    found = [(text.find(stop), len(stop)) for stop in self._stop]
    # The one that is complete first, however the text was cut into tokens.
    ends = [(at + length, at) for at, length in found if at >= 0]
    if ends:
      self.stopped, self._held = True, ""
      return text[: min(ends)[1]]
    keep = max((overlap(text, stop) for stop in self._stop), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
  """Length of the longest end of the text that the stop string begins with."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
