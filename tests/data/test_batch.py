"""Batch: targets and masks from packed rows, against a loop."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from dsv32_jax.data import batch as batches


def expected(tokens_BT, learn_BT, segments_BT):
  """Returns targets and loss mask, position by position."""
  targets_BT = np.zeros_like(tokens_BT)
  mask_BT = np.zeros(tokens_BT.shape, np.float32)
  size, length = tokens_BT.shape
  for b in range(size):
    for t in range(length - 1):
      if segments_BT[b, t] and segments_BT[b, t] == segments_BT[b, t + 1]:
        targets_BT[b, t] = tokens_BT[b, t + 1]
        mask_BT[b, t] = float(bool(learn_BT[b, t + 1]))
  return targets_BT, mask_BT


@settings(deadline=None, max_examples=100)
@given(
  rows=st.lists(
    st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=3
  ),
  extra=st.integers(0, 3),
  seed=st.integers(0, 2**20),
)
def test_targets_and_mask(rows, extra, seed):
  rng = np.random.default_rng(seed)
  length = max(1, max(sum(row) for row in rows) + extra)
  tokens_BT = rng.integers(1, 50, (len(rows), length))
  learn_BT = rng.integers(0, 2, (len(rows), length))
  segments_BT = np.zeros((len(rows), length), np.int32)
  positions_BT = np.zeros_like(segments_BT)
  for b, row in enumerate(rows):
    end = 0
    for number, size in enumerate(row, 1):
      segments_BT[b, end : end + size] = number
      positions_BT[b, end : end + size] = np.arange(size)
      end += size
  got = batches.from_packed(tokens_BT, learn_BT, segments_BT, positions_BT)
  targets_BT, mask_BT = expected(tokens_BT, learn_BT, segments_BT)
  np.testing.assert_array_equal(got.targets_BT, targets_BT)
  np.testing.assert_array_equal(got.loss_mask_BT, mask_BT)
  np.testing.assert_array_equal(
    got.tokens_BT, np.where(segments_BT, tokens_BT, 0)
  )
  np.testing.assert_array_equal(got.positions_BT, positions_BT)
  assert [x.dtype for x in jax.tree.leaves(got)] == [
    *[np.int32] * 2,
    np.float32,
    *[np.int32] * 2,
  ]


def test_is_a_pytree():
  batch = batches.from_documents([[5, 6, 7], [8]], 4)
  moved = jax.jit(lambda x: x)(batch)
  assert isinstance(moved, batches.Batch)
  np.testing.assert_array_equal(moved.targets_BT, [[6, 7, 0, 0], [0] * 4])
  np.testing.assert_array_equal(moved.segments_BT, [[1, 1, 1, 0], [1, 0, 0, 0]])
  np.testing.assert_array_equal(moved.loss_mask_BT, [[1, 1, 0, 0], [0] * 4])
  np.testing.assert_array_equal(
    moved.positions_BT, [[0, 1, 2, 0], [0, 0, 0, 0]]
  )


def test_padding_has_no_loss():
  for leaf in jax.tree.leaves(batches.padding(2, 3)):
    assert leaf.shape == (2, 3)
    assert not leaf.any()


def test_bad_shapes():
  with pytest.raises(ValueError, match="shapes="):
    batches.from_packed([[1, 2]], [[1]], [[1, 1]], [[0, 1]])
  with pytest.raises(ValueError, match=r"length=3 above sequence_length=2"):
    batches.from_documents([[1, 2, 3]], 2)
