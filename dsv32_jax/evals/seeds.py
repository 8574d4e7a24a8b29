"""What a few repetitions with different seeds say together."""

from collections.abc import Sequence
import math

import numpy as np

# Student's t at 97.5%, by degrees of freedom from 1 on.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean over seeds and half of its 95% interval, None for one seed alone.

  Student's t: three seeds are far too few for the normal approximation.

  Raises:
    ValueError: for no seeds, or more than ten.
  """
  if not 1 <= len(values) <= len(_STUDENT) + 1:
    raise ValueError(f"{len(values)} seeds must be 1 to {len(_STUDENT) + 1}")
  mean = float(np.mean(values))
  if len(values) == 1:
    return mean, None
  error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  return mean, _STUDENT[len(values) - 2] * error
