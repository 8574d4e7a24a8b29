"""The choice among given scores against a sort in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import index_select

# B batch, T queries, S keys, N selected keys


def best(score_BTS, slots_BT, top_k):
  """Sorted indices of the best, ties to the lowest, padded with -1."""
  want_BTN = np.full((*slots_BT.shape, top_k), -1)
  for place in np.ndindex(slots_BT.shape):
    seen_S = score_BTS[place][: slots_BT[place] + 1].astype(np.float64)
    if np.isnan(seen_S).any():
      continue
    order = np.argsort(-seen_S, kind="stable")[:top_k]
    want_BTN[place][: len(order)] = np.sort(order)
  return want_BTN


@pytest.mark.parametrize("num_keys,top_k", [(7, 9), (130, 16), (1000, 64)])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_best_scores(num_keys, top_k, queries):
  rng = np.random.default_rng(num_keys)
  # Few values: many ties, -0.0 among them, and -inf.
  values = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0, 2.5], np.float32)
  score_BTS = rng.choice(values, (4, queries, num_keys))
  slots_BT = rng.integers(-1, num_keys, (4, queries))
  slots_BT[0], slots_BT[1] = num_keys - 1, -1
  score_BTS[2, 0, max(slots_BT[2, 0], 0)] = np.nan
  got_BTN, invalid_BT = index_select.select_scored(
    jnp.asarray(score_BTS), jnp.asarray(slots_BT, jnp.int32), top_k=top_k
  )
  want_BTN = best(score_BTS, slots_BT, top_k)
  np.testing.assert_array_equal(got_BTN, want_BTN)
  invalid = np.zeros_like(slots_BT, bool)
  invalid[2, 0] = slots_BT[2, 0] >= 0
  np.testing.assert_array_equal(invalid_BT, invalid)


def test_what_does_not_fit_is_named():
  score_BTS = jnp.zeros((2, 1, 8))
  with pytest.raises(ValueError, match=r"slots_BT\.shape"):
    index_select.select_scored(score_BTS, jnp.zeros((2,), jnp.int32), top_k=2)
  with pytest.raises(ValueError, match="top_k=0"):
    index_select.select_scored(score_BTS, jnp.zeros((2, 1)), top_k=0)
