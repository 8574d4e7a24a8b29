"""What tests of the kernels for Hopper share: the interpreter, and closeness.

The interpreter needs a newer JAX than the oldest that the project takes.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np
import pytest

from tests.support import tolerances

interpreted = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"jax {jax.__version__} has no interpreter for these kernels",
)


def interpreter():
  """Returns what a kernel takes as `interpret`; races are reported."""
  return plgpu.InterpretGPUParams(detect_races=True)


def assert_close(actual, expected, dtype="bfloat16"):
  """Compares at the scale of the largest expected value, infinities exactly.

  By default in bfloat16, to which the kernels round weights and products.
  """
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  finite = np.isfinite(expected)
  np.testing.assert_array_equal(actual[~finite], expected[~finite])
  actual, expected = actual[finite], expected[finite]
  scale = max(1.0, np.abs(expected).max(initial=0.0))
  tolerances.assert_close(actual / scale, expected / scale, dtype)
