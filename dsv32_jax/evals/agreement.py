"""Whether two selections of keys agree, where scores may tie.

The indexer's ReLU makes exact zeros and so real ties, which other code may
break as it likes, and sums in another order move scores by rounding. So two
selections of a query agree when every key that is in one and not in the other
scores within a tolerance of the k-th best score.
"""

from typing import NamedTuple

import numpy as np

# X any leading axes, queries last; S keys

# Of the largest |score| of a row: float32 rounding of a sum of a few hundred.
TOLERANCE = 1e-5


class Agreement(NamedTuple):
  """How two selections compare.

  Attributes:
    differs_X: bool, True where a query's selections are not the same.
    disagrees_X: bool, True where they differ by more than ties explain.
  """

  differs_X: np.ndarray
  disagrees_X: np.ndarray


def selections_agree(
  scores_XS: np.ndarray,
  first_XS: np.ndarray,
  second_XS: np.ndarray,
  top_k: int,
  *,
  tolerance: float = TOLERANCE,
) -> Agreement:
  """Compares two selections of min(top_k, visible) keys a query.

  Args:
    scores_XS: float index scores, -inf on keys that a query may not see.
    first_XS: bool, one selection.
    second_XS: bool, the other.
    top_k: keys to select where as many are visible.
    tolerance: distance from the k-th score at which a key may be in either,
      as a share of the row's largest |score|.

  Returns:
    An Agreement. A selection of the wrong number of keys, or of a key that is
    not visible, disagrees with any other.

  Raises:
    ValueError: shapes or types that do not fit, NaN among the scores.
  """
  scores_XS = np.asarray(scores_XS, np.float64)
  shape = scores_XS.shape
  if not first_XS.shape == second_XS.shape == shape or not shape:
    raise ValueError(f"{shape=} {first_XS.shape=} {second_XS.shape=} differ")
  if first_XS.dtype != bool or second_XS.dtype != bool:
    raise ValueError(f"{first_XS.dtype=} {second_XS.dtype=} must be bool")
  if top_k < 1:
    raise ValueError(f"{top_k=} must be at least 1")
  if np.isnan(scores_XS).any():
    raise ValueError("scores_XS has NaN: no order, no selection")
  visible_XS = scores_XS > -np.inf
  wanted_X = np.minimum(visible_XS.sum(axis=-1), top_k)
  ranked_XS = -np.sort(-scores_XS, axis=-1)
  last_X1 = np.maximum(wanted_X - 1, 0)[..., None]
  threshold_X1 = np.take_along_axis(ranked_XS, last_X1, axis=-1)
  # Hidden keys and their threshold count as 0: those rows are told below.
  seen_XS = np.where(visible_XS, scores_XS, 0.0)
  threshold_X1 = np.where(wanted_X[..., None] > 0, threshold_X1, 0.0)
  allowed_X1 = tolerance * np.abs(seen_XS).max(axis=-1, keepdims=True)
  far_XS = np.abs(seen_XS - threshold_X1) > allowed_X1
  disagrees_X = ((first_XS ^ second_XS) & far_XS).any(axis=-1)
  for chosen_XS in (first_XS, second_XS):
    disagrees_X |= chosen_XS.sum(axis=-1) != wanted_X
    disagrees_X |= (chosen_XS & ~visible_XS).any(axis=-1)
  return Agreement((first_XS != second_XS).any(axis=-1), disagrees_X)
