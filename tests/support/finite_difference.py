"""Central differences, to judge analytic gradients in float64."""

import numpy as np

# The optimal step for float64 loses about half of its digits.
STEP = 1e-6
DIFFERENCE_TOLERANCE = (1e-6, 1e-8)


def finite_difference(function, x_X):
  """Gradient of a scalar function at x (float64, any shape), by entries."""
  grad_X = np.zeros_like(x_X)
  for index in np.ndindex(x_X.shape):
    high_X, low_X = x_X.copy(), x_X.copy()
    high_X[index] += STEP
    low_X[index] -= STEP
    grad_X[index] = (function(high_X) - function(low_X)) / (2 * STEP)
  return grad_X
