"""Replies that begin with a tool call, whatever the model would rather write.

Only their start is decided: the name of the tool, where several may be called,
and everything behind it are drawn freely.
"""

from collections.abc import Sequence

import numpy as np

from dsv32_jax.agents import chat_format
from dsv32_jax.agents import token_stream
from dsv32_jax.data import tokenizer as tokenizers

# W words of 32 tokens


class ForcedCalls:
  """A `requests.Constraint`: thinking if need be, then the start of a call.

  It remembers nothing, and serves any number of requests.
  """

  failure = None

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    names: Sequence[str],
    *,
    thinking: bool,
  ):
    """Spells out how a call of each tool begins.

    Args:
      tokenizer: of the model.
      names: of the tools that may be called, at least one.
      thinking: whether the prompt ends with the opening of the thinking.
    """
    assert names
    self._starts = [_start(tokenizer, name) for name in names]
    self._words = -(-tokenizer.vocab_size // 32)
    self._eos_id = tokenizer.eos_id
    self._think_end = tokenizer.special_id("think_end") if thinking else None

  def allowed(self, drawn: Sequence[int]) -> np.ndarray | None:
    """See `requests.Constraint`."""
    begun = behind_thinking(drawn, self._think_end)
    if begun is None:
      return all_but(self._eos_id, self._words)
    count = len(begun)
    # None of them is the beginning of another: a quote ends the name.
    if any(start == begun[: len(start)] for start in self._starts):
      return None
    return self._only(
      {start[count] for start in self._starts if start[:count] == begun}
    )

  def _only(self, token_ids: set[int]) -> np.ndarray:
    allowed_W = np.zeros(self._words, np.uint32)
    for token_id in token_ids:
      allowed_W[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return allowed_W


def behind_thinking(
  drawn: Sequence[int], think_end: int | None
) -> tuple[int, ...] | None:
  """Returns what follows the mark; None: it has not come; no mark: all."""
  if think_end is None:
    return tuple(drawn)
  if think_end not in drawn:
    return None
  return tuple(drawn[drawn.index(think_end) + 1 :])


def all_but(eos_id: int, words: int) -> np.ndarray:
  """Allows what may come in thinking: an answer does not end before it."""
  allowed_W = np.full(words, 0xFFFFFFFF, np.uint32)
  allowed_W[eos_id // 32] &= ~np.uint32(1 << (eos_id % 32))
  return allowed_W


def _start(tokenizer, name) -> tuple[int, ...]:
  pieces = [
    token_stream.Piece(text=text) for text in chat_format.first_call_block(name)
  ]
  return tuple(token_stream.TokenStream(tokenizer, pieces).token_ids())
