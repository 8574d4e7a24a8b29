"""Intervals over a few seeds against textbook values."""

import math

import pytest

from dsv32_jax.evals import seeds


def test_three_seeds():
  mean, half = seeds.mean_and_interval([1.0, 2.0, 6.0])
  assert mean == 3.0
  # Standard deviation sqrt(7), two degrees of freedom.
  assert half == pytest.approx(4.303 * math.sqrt(7 / 3))


def test_one_seed_has_no_interval():
  assert seeds.mean_and_interval([0.5]) == (0.5, None)


@pytest.mark.parametrize("count", [0, 11])
def test_other_numbers_are_refused(count):
  with pytest.raises(ValueError, match=f"{count} seeds"):
    seeds.mean_and_interval([1.0] * count)
