"""Packed selections against bits and lists taken with numpy."""

import jax
import numpy as np
import pytest

from pallas_kernels import bitmask

SIZES = [1, 31, 32, 33, 100, 257, 1500]


def random_mask(num_keys, density=0.3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.random((2, 5, num_keys)) < density


@pytest.mark.parametrize("num_keys", SIZES)
def test_key_is_bit_of_word(num_keys):
  mask_BTS = random_mask(num_keys)
  words_BTW = np.asarray(bitmask.pack(mask_BTS))
  assert words_BTW.dtype == np.uint32
  assert words_BTW.shape == (2, 5, -(-num_keys // 32))
  for key in range(words_BTW.shape[-1] * 32):
    bit_BT = (words_BTW[..., key // 32] >> np.uint32(key % 32)) & 1
    want_BT = mask_BTS[..., key] if key < num_keys else np.zeros((2, 5))
    np.testing.assert_array_equal(bit_BT, want_BT)


@pytest.mark.parametrize("num_keys", SIZES)
def test_unpack_inverts_pack(num_keys):
  mask_BTS = random_mask(num_keys)
  np.testing.assert_array_equal(
    bitmask.unpack(bitmask.pack(mask_BTS), num_keys), mask_BTS
  )


@pytest.mark.parametrize("num_keys", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("num_selected", [1, 7, 300])
def test_to_indices_lists_set_bits(num_keys, density, num_selected):
  mask_BTS = random_mask(num_keys, density)
  got_BTN = jax.jit(bitmask.to_indices, static_argnums=(1, 2))(
    bitmask.pack(mask_BTS), num_selected, num_keys
  )
  want_BTN = np.full((2, 5, num_selected), -1)
  for b, t in np.ndindex(2, 5):
    keys_N = np.flatnonzero(mask_BTS[b, t])[:num_selected]
    want_BTN[b, t, : len(keys_N)] = keys_N
  np.testing.assert_array_equal(got_BTN, want_BTN)


def test_from_indices_ignores_padding_order_and_repeats():
  indices_BTN = np.array([[[40, 3, -1, 3], [-1, -1, -1, -1], [64, 0, 99, 65]]])
  mask_BTS = bitmask.unpack(bitmask.from_indices(indices_BTN, 65), 65)
  listed = [np.flatnonzero(row_S).tolist() for row_S in np.asarray(mask_BTS[0])]
  assert listed == [[3, 40], [], [0, 64]]


@pytest.mark.parametrize("num_keys", SIZES)
def test_indices_round_trip(num_keys):
  words_BTW = bitmask.pack(random_mask(num_keys, seed=1))
  indices_BTN = bitmask.to_indices(words_BTW, num_keys, num_keys)
  np.testing.assert_array_equal(
    bitmask.from_indices(indices_BTN, num_keys), words_BTW
  )


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="must be bool"):
    bitmask.pack(np.zeros((1, 1, 4), np.int32))
  with pytest.raises(ValueError, match="words=2"):
    bitmask.unpack(np.zeros((1, 1, 1), np.uint32), 33)
  with pytest.raises(ValueError, match="must be uint32"):
    bitmask.to_indices(np.zeros((1, 1, 1), np.int32), 4, 32)
