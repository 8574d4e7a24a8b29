"""Pieces of text, special tokens and drawn tokens joined to one list of ids."""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

from dsv32_jax.agents import chat_format
from dsv32_jax.data import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A stretch of a conversation without a change of the past.

  Attributes:
    token_ids: all tokens, up to the last one drawn.
    written: for each, whether the model drew it in this part; those that an
      earlier part holds already are context here.
    logprobs: of drawn tokens, as the sampler gave them; 0 for all others.
    records: what else the sampler gave, one for each completion.
  """

  token_ids: tuple[int, ...]
  written: tuple[bool, ...]
  logprobs: tuple[float, ...]
  records: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """Text, a special token, or tokens that stay as they are.

  Attributes:
    text: text, or a `chat_format.SpecialToken`.
    token_ids: where not None, it takes the place of the text.
    written: whether the model drew it.
    logprobs: of token_ids; None for zeros.
  """

  text: str = ""
  token_ids: tuple[int, ...] | None = None
  written: bool = False
  logprobs: tuple[float, ...] | None = None


class TokenStream:
  """Grows at the end; what it has given out never changes.

  Text is tokenised when ids are asked for, up to the next special token at
  once: where two pieces of text meet is not a border of tokens.
  """

  def __init__(
    self, tokenizer: tokenizers.Tokenizer | None, pieces: Iterable[Piece]
  ):
    """Begins with pieces; without a tokenizer there are no ids to ask for."""
    self._tokenizer = tokenizer
    self._token_ids: list[int] = []
    self._written: list[bool] = []
    self._logprobs: list[float] = []
    self._records: list[Any] = []
    self._pending = list(pieces)

  def append(self, pieces: Iterable[Piece]) -> None:
    self._pending += pieces

  def add_record(self, record: Any) -> None:
    self._records.append(record)

  def token_ids(self) -> list[int]:
    """Returns all ids; later text will not change them."""
    self._flush()
    return list(self._token_ids)

  def __len__(self) -> int:
    self._flush()
    return len(self._token_ids)

  def part(self) -> Part | None:
    """Returns the stream up to the last written token, None without one."""
    if self._tokenizer is None:
      return None
    self._flush()
    if True not in self._written:
      return None
    end = len(self._written) - self._written[::-1].index(True)
    return Part(
      token_ids=tuple(self._token_ids[:end]),
      written=tuple(self._written[:end]),
      logprobs=tuple(self._logprobs[:end]),
      records=tuple(self._records),
    )

  def fork(self) -> "TokenStream":
    """Returns a stream with the same content that grows by itself."""
    other = TokenStream(self._tokenizer, self._pending)
    other._token_ids = list(self._token_ids)
    other._written = list(self._written)
    other._logprobs = list(self._logprobs)
    other._records = list(self._records)
    return other

  def _flush(self) -> None:
    if not self._pending:
      return
    if self._tokenizer is None:
      raise ValueError("a conversation without a tokenizer has no tokens")
    text, written = [], False
    for piece in self._pending:
      token_ids = self._fixed_ids(piece)
      if token_ids is not None or piece.written != written:
        self._extend(self._tokenizer.encode("".join(text)), written)
        text, written = [], piece.written
      if token_ids is None:
        text.append(piece.text)
      else:
        self._extend(token_ids, piece.written, piece.logprobs)
    self._extend(self._tokenizer.encode("".join(text)), written)
    self._pending = []

  def _fixed_ids(self, piece: Piece) -> Sequence[int] | None:
    """Ids of a piece that is no text, else None."""
    if piece.token_ids is not None:
      return piece.token_ids
    if not isinstance(piece.text, chat_format.SpecialToken):
      return None
    try:
      return (self._tokenizer.special_id(piece.text.name),)
    except ValueError:
      # Tokenizers older than the format spell the mark of tool calls out.
      if piece.text == chat_format.DSML:
        return None
      raise

  def _extend(self, token_ids, written, logprobs=None):
    self._token_ids += token_ids
    self._written += [written] * len(token_ids)
    self._logprobs += logprobs or [0.0] * len(token_ids)


def require_unicode(pieces: Iterable[Piece]) -> None:
  """Raises ValueError for text that has no UTF-8 form, so no tokens."""
  try:
    for piece in pieces:
      piece.text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"a message holds what is no text: {error}") from error
