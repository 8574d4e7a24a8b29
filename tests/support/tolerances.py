"""The one table of tolerances: how far a result may be from its oracle.

A test compares in the dtype the code under test computes in, as in
`np.testing.assert_allclose(got, want, *TOLERANCE["float32"])`. Entries are
(relative, absolute) and hold for values of order one; a test with larger values
scales its inputs, never its tolerance.
"""

import numpy as np

# Rounding to the dtype's mantissa, with room for sums of a few hundred terms.
TOLERANCE = {
  "float64": (1e-12, 1e-12),
  "float32": (1e-5, 1e-5),
  "bfloat16": (2e-2, 2e-2),
  "float16": (2e-3, 2e-3),
  "float8_e4m3fn": (1e-1, 1e-1),
}


def assert_close(got, want, dtype: str | None = None):
  """Raises AssertionError unless `got` is within its dtype's tolerance.

  Args:
    got: array of the code under test.
    want: array of the oracle, same shape.
    dtype: key of `TOLERANCE`; None takes that of `got`.
  """
  relative, absolute = TOLERANCE[dtype or np.dtype(got.dtype).name]
  np.testing.assert_allclose(
    np.asarray(got, np.float64),
    np.asarray(want, np.float64),
    rtol=relative,
    atol=absolute,
  )
