"""How results are compared with recorded ones."""

import numpy as np


def relative_error(got, want) -> float:
  """Returns max |got - want| over max |want|, of the finite entries.

  Raises:
    AssertionError: shapes differ, or entries that are not finite.
  """
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, f"{got.shape=} {want.shape=}"
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite])
  if not finite.any():
    return 0.0
  largest = max(np.abs(want[finite]).max(), 1e-30)
  return float(np.abs(got[finite] - want[finite]).max() / largest)


def assert_matches(name, got, want, tolerance):
  """Equal if not float; else within tolerance of the largest |want|."""
  want = np.asarray(want)
  if want.dtype.kind in "bui":
    np.testing.assert_array_equal(got, want, err_msg=name)
    return
  error = relative_error(got, want)
  assert error <= tolerance, f"{name}: {error=} exceeds {tolerance=}"
