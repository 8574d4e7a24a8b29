"""From sequences to the arrays of a step."""

from collections.abc import Sequence as Sequences

import numpy as np

from dsv32_jax.generation import programs
from dsv32_jax.generation import sampler
from dsv32_jax.generation import scheduler
from dsv32_jax.generation import sequence

# B rows, T tokens, M pages of a sequence


class Batch:
  """Rows of one step; those that no sequence is put into run nothing."""

  def __init__(self, rows: int, row_tokens: int):
    """Makes empty rows of `row_tokens` tokens each."""
    shape = (rows, row_tokens)
    self._sequences: list[sequence.Sequence | None] = [None] * rows
    self._tokens_BT = np.zeros(shape, np.int32)
    self._next_BT = np.full(shape, -1, np.int32)
    self._length_B = np.zeros(rows, np.int32)
    self._count_B = np.zeros(rows, np.int32)

  def put(self, row: int, one: sequence.Sequence, tokens, start: int) -> None:
    """Has a row run tokens of a sequence, of which `start` are in the cache."""
    self._sequences[row] = one
    self._tokens_BT[row, : len(tokens)] = tokens
    self._length_B[row], self._count_B[row] = start, len(tokens)

  def put_part(self, row: int, part: scheduler.Part) -> None:
    """Has a row run a part of a prompt."""
    tokens = part.one.tokens
    self.put(row, part.one, tokens[part.start : part.end], part.start)
    known = tokens[part.start + 1 : part.end + 1]
    self._next_BT[row, : len(known)] = known

  def call(
    self, page_counts: Sequences[int], vocab_size: int, most_adjusted: int
  ) -> programs.Call:
    """Returns the step.

    Args:
      page_counts: it is at the least of them that holds its rows.
      vocab_size: of the model.
      most_adjusted: logits of a row that can be changed.
    """
    many = self._sequences
    needed = max((len(one.pages) for one in many if one), default=1)
    num_pages = min(count for count in page_counts if count >= needed)
    table_BM = np.zeros((len(many), num_pages), np.int32)
    for row, one in enumerate(many):
      if one:
        table_BM[row, : len(one.pages)] = one.pages
    rows = sampler.rows(
      [one and one.request.sampling for one in many],
      [one.seed if one else 0 for one in many],
      [one.num_drawn if one else 0 for one in many],
      vocab_size,
      [one and one.allowed for one in many],
    )
    if any(one and one.request.sampling.adjusts for one in many):
      changes = sampler.biases(
        [one.bias if one else {} for one in many], most_adjusted
      )
      rows = rows._replace(bias_id_BK=changes[0], bias_BK=changes[1])
    return programs.Call(
      self._tokens_BT,
      self._next_BT,
      self._length_B,
      self._count_B,
      table_BM,
      rows,
    )
