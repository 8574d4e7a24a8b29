"""The oracle's losses: by hand and by finite differences.

Axes: B batch, T queries, S keys, H heads, J selected keys, W vocabulary.
"""

import numpy as np
import pytest

from tests.support import finite_difference
from tests.support import oracle_losses
from tests.support import oracle_ops
from tests.support import tolerances

EXACT = tolerances.TOLERANCE["float64"]


def close(got, want, tolerance=EXACT):
  np.testing.assert_allclose(got, want, rtol=tolerance[0], atol=tolerance[1])


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_shifted_targets():
  ids_BT = np.array([[5, 6, 7, 8, 9]])
  segments_BT = np.array([[1, 1, 1, 2, 2]])
  target_BT, mask_BT = oracle_losses.shifted_targets(ids_BT, 1, segments_BT)
  np.testing.assert_array_equal(target_BT, [[6, 7, 8, 9, 0]])
  np.testing.assert_array_equal(mask_BT, [[1, 1, 0, 1, 0]])
  target_BT, mask_BT = oracle_losses.shifted_targets(ids_BT, 2, segments_BT)
  np.testing.assert_array_equal(target_BT, [[7, 8, 9, 0, 0]])
  np.testing.assert_array_equal(mask_BT, [[1, 0, 0, 0, 0]])


def test_cross_entropy(rng):
  logits_BTW = rng.standard_normal((2, 3, 4))
  target_BT = rng.integers(0, 4, (2, 3))
  weight_BT = np.array([[0.5, 0.0, 1.0], [1.0, 0.2, 0.0]])
  loss, grad_BTW = oracle_losses.cross_entropy(logits_BTW, target_BT, weight_BT)
  want = sum(
    weight_BT[b, t]
    * (
      np.log(np.exp(logits_BTW[b, t]).sum()) - logits_BTW[b, t, target_BT[b, t]]
    )
    for b, t in np.ndindex(2, 3)
  )
  close(loss, want)
  numeric_BTW = finite_difference.finite_difference(
    lambda x: oracle_losses.cross_entropy(x, target_BT, weight_BT)[0],
    logits_BTW,
  )
  close(grad_BTW, numeric_BTW, finite_difference.DIFFERENCE_TOLERANCE)


@pytest.mark.parametrize(
  ("kl", "top_k"),
  [
    (oracle_losses.indexer_kl_dense, None),
    (oracle_losses.indexer_kl_sparse, 3),
  ],
)
def test_indexer_kl(rng, kl, top_k):
  allowed_BTS = oracle_ops.allowed_pairs(
    2, 6, np.array([[0] * 6, [0, 0, 1, 1, 1, 1]])
  )
  scores_BTS = rng.standard_normal((2, 6, 6))
  mask_BTS = allowed_BTS
  if top_k is not None:
    mask_BTS = oracle_ops.select_top_k(scores_BTS, allowed_BTS, top_k)
  # Attention over every allowed key: the sparse loss must restrict it itself.
  weights_BTHS = oracle_ops.masked_softmax(
    3.0 * rng.standard_normal((2, 6, 3, 6)), allowed_BTS[:, :, None]
  )
  weight_BT = rng.random((2, 6))
  weight_BT[0, 2] = 0.0
  loss, kl_BT, grad_BTS = kl(weights_BTHS, scores_BTS, mask_BTS, weight_BT)
  for b, t in np.ndindex(2, 6):
    keys_J = np.flatnonzero(mask_BTS[b, t])
    p_J = weights_BTHS[b, t].sum(0)[keys_J]
    p_J = p_J / p_J.sum()
    q_J = np.exp(scores_BTS[b, t, keys_J])
    q_J = q_J / q_J.sum()
    close(kl_BT[b, t], np.sum(p_J * np.log(p_J / q_J)))
  close(loss, np.sum(weight_BT * kl_BT))
  numeric_BTS = finite_difference.finite_difference(
    lambda x: kl(weights_BTHS, x, mask_BTS, weight_BT)[0], scores_BTS
  )
  close(grad_BTS, numeric_BTS, finite_difference.DIFFERENCE_TOLERANCE)
  assert (grad_BTS[~mask_BTS] == 0).all()
  close(grad_BTS.sum(-1), np.zeros((2, 6)))


def test_kl_is_zero_at_the_target_and_finite_at_zero_mass(rng):
  mask_BTS = np.ones((1, 1, 4), bool)
  p_BTS = np.array([[[0.5, 0.25, 0.25, 0.0]]])
  one_BT = np.ones((1, 1))
  scores_BTS = np.log(np.maximum(p_BTS, 1e-300)) + 7.0
  loss, _, grad_BTS = oracle_losses.indexer_kl(
    p_BTS, scores_BTS, mask_BTS, one_BT
  )
  close(loss, 0.0)
  close(grad_BTS, np.zeros((1, 1, 4)))
  loss, _, grad_BTS = oracle_losses.indexer_kl(
    p_BTS, np.zeros((1, 1, 4)), mask_BTS, one_BT
  )
  close(loss, 0.5 * np.log(2.0))
  close(grad_BTS[0, 0], [-0.25, 0.0, 0.0, 0.25])
