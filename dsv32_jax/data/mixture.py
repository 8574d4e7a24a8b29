"""Exact mixing of rows by weight.

Grain's own mix rounds weights to multiples of a hundredth of the smallest, so
0.7 and 0.3 come out as 233 to 100. Here the counts are those of the weights at
every multiple of their common denominator, and within one row of it or so in
between.
"""

from collections.abc import Sequence
import fractions
import math

import grain


def integer_weights(weights: Sequence[float]) -> list[int]:
  """Returns the smallest integers in the ratio of the weights.

  Args:
    weights: positive numbers, taken as the decimal fractions they print as.
  """
  exact = [fractions.Fraction(str(weight)) for weight in weights]
  scale = math.lcm(*(weight.denominator for weight in exact))
  integers = [int(weight * scale) for weight in exact]
  divisor = math.gcd(*integers)
  return [integer // divisor for integer in integers]


def next_source(counts: Sequence[int], weights: Sequence[int]) -> int:
  """Returns the source that is furthest behind its share.

  Args:
    counts: rows taken so far from each source.
    weights: integers, see `integer_weights`.

  Returns:
    An index; of equals the lowest.
  """
  step, total = sum(counts) + 1, sum(weights)
  behind = [
    weight * step - count * total for count, weight in zip(counts, weights)
  ]
  return behind.index(max(behind))


class MixedRows(grain.IterDataset):
  """Takes rows from several sources in the ratio of their weights.

  Ends when the source whose turn it is has no row left.
  """

  def __init__(
    self, parents: Sequence[grain.IterDataset], weights: Sequence[float]
  ):
    super().__init__(parents)
    self._weights = integer_weights(weights)

  def __iter__(self):
    return _MixedRowsIterator(
      [iter(parent) for parent in self.parents], self._weights
    )


class _MixedRowsIterator(grain.DatasetIterator):
  """State: how many rows came from each source, and the sources' states."""

  def __init__(self, parents, weights: Sequence[int]):
    super().__init__(parents)
    self._weights = weights
    self._counts = [0] * len(weights)

  def __next__(self):
    source = next_source(self._counts, self._weights)
    row = next(self._parents[source])
    self._counts[source] += 1
    return row

  def get_state(self):
    return {
      "counts": list(self._counts),
      "parents": [parent.get_state() for parent in self._parents],
    }

  def set_state(self, state):
    self._counts = list(state["counts"])
    for parent, parent_state in zip(self._parents, state["parents"]):
      parent.set_state(parent_state)
