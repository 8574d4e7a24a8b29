"""Mixing by weight: exact counts."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dsv32_jax.data import mixture


@pytest.mark.parametrize(
  ("weights", "integers"),
  [
    ([1.0], [1]),
    ([0.7, 0.3], [7, 3]),
    ([0.1, 0.2, 0.7], [1, 2, 7]),
    ([2, 4], [1, 2]),
    ([1e-4, 1.0], [1, 10000]),
  ],
)
def test_integer_weights(weights, integers):
  assert mixture.integer_weights(weights) == integers


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_counts_are_exact_each_round_and_near_in_between(weights):
  weights = mixture.integer_weights(weights)
  total = sum(weights)
  counts = [0] * len(weights)
  for step in range(1, 3 * total + 1):
    counts[mixture.next_source(counts, weights)] += 1
    for count, weight in zip(counts, weights):
      assert count - 1 < step * weight / total
      assert count + len(weights) > step * weight / total
    if step % total == 0:
      assert counts == [step // total * weight for weight in weights]
