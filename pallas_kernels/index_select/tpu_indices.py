"""Lists the set bits of packed selections on a TPU, without a gather.

A row of words lies as G groups of 32 (Z). The n-th set bit is found top down:
1. The group: the one whose running count of bits spans n; as a one-hot column,
   for 512 (P) values of n at a time along the lanes.
2. Its 32 words and their running counts, by a product of their bytes [6 Z,G]
   with the one-hots [G,P]: bytes are exact in bfloat16, sums have one term.
3. The word: the last whose running count is at most what is left of n, by
   comparing along the sublanes; the bit by five halvings of the word.

Memory a step: 8 rows of words, 8 rows of indices, [6 Z,P] float32 (0.4 MB). A
row of 131072 keys has 128 groups, the depth of a product: 2048 indices take 384
products of 8 x 128 x 128.
"""
# B batch, T queries, W words, R rows (B times T), N indices

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels import bitmask

LANES = 128
ROWS = 8
GROUP = 32
PIECE = 512


def to_indices(mask_BTW, num_selected: int, *, interpret=False):
  """As `bitmask.to_indices`: int32 [B,T,num_selected], ascending, then -1."""
  batch, queries, words = mask_BTW.shape
  rows = -(-batch * queries // ROWS) * ROWS
  # Whole registers of groups.
  groups = -(-words // (8 * GROUP)) * 8
  mask_RW = mask_BTW.reshape(batch * queries, words)
  mask_RW = jnp.pad(
    lax.bitcast_convert_type(mask_RW, jnp.int32),
    [(0, rows - batch * queries), (0, groups * GROUP - words)],
  )
  mask_RGZ = mask_RW.reshape(rows, groups, GROUP)
  piece = min(PIECE, -(-num_selected // LANES) * LANES)
  slots = -(-num_selected // piece) * piece
  index_RN = pl.pallas_call(
    functools.partial(_kernel, piece=piece),
    out_shape=jax.ShapeDtypeStruct((rows, slots), jnp.int32),
    grid=(rows // ROWS,),
    in_specs=[
      pl.BlockSpec((ROWS, groups, GROUP), lambda i: (i, 0, 0)),
      pl.BlockSpec((ROWS, GROUP, groups), lambda i: (i, 0, 0)),
    ],
    out_specs=pl.BlockSpec((ROWS, slots), lambda i: (i, 0)),
    interpret=interpret,
    name="list_bits",
  )(mask_RGZ, jnp.swapaxes(mask_RGZ, 1, 2))
  return index_RN[: batch * queries, :num_selected].reshape(batch, queries, -1)


def _kernel(words_RGZ, words_RZG, index_RN, *, piece):
  def row(r, carry):
    count_G1, before_G1, planes_XG = _counts(words_RGZ[r], words_RZG[r])
    for first in range(0, index_RN.shape[1], piece):
      rank_1P = first + lax.broadcasted_iota(jnp.int32, (1, piece), 1)
      index_RN[pl.ds(r, 1), pl.ds(first, piece)] = _find(
        rank_1P, count_G1, before_G1, planes_XG
      )
    return carry

  lax.fori_loop(0, ROWS, row, 0)


def _counts(words_GZ, words_ZG):
  """Step 1's counts of a row, and the bytes that step 2 picks from.

  Returns:
    Set bits of each group and of those before it, int32 [G,1], and the planes
    [6 Z,G]: four bytes of the words, two of the running count in the group.
  """
  groups = words_GZ.shape[0]
  count_ZG = lax.population_count(words_ZG).astype(jnp.float32)
  # Counts up to 32 are exact in bfloat16, their sums in float32.
  inside_ZG = jnp.dot(
    _below(GROUP).astype(jnp.bfloat16),
    count_ZG.astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  ).astype(jnp.int32)
  count_GZ = lax.population_count(words_GZ).astype(jnp.float32)
  count_G1 = jnp.sum(count_GZ, axis=1, keepdims=True)
  total_1G = jnp.sum(count_ZG, axis=0, keepdims=True)
  before_G1 = jnp.sum(
    jnp.where(_below(groups), total_1G, 0.0), axis=1, keepdims=True
  )
  planes_XG = jnp.concatenate(
    [
      (lax.shift_right_logical(x, jnp.full_like(x, shift)) & 255)
      .astype(jnp.float32)
      .astype(jnp.bfloat16)
      for x, shifts in ((words_ZG, (0, 8, 16, 24)), (inside_ZG, (0, 8)))
      for shift in shifts
    ]
  )
  return count_G1.astype(jnp.int32), before_G1.astype(jnp.int32), planes_XG


def _find(rank_1P, count_G1, before_G1, planes_XG):
  """Returns the indices of the bits of these ranks, -1 past the last."""
  left_GP = rank_1P - before_G1
  own_GP = (left_GP >= 0) & (left_GP < count_G1)
  group_GP = lax.broadcasted_iota(jnp.int32, own_GP.shape, 0)
  group_1P = _picked(own_GP, group_GP)
  left_1P = _picked(own_GP, left_GP)
  total_11 = jnp.sum(count_G1, axis=0, keepdims=True)
  picked_XP = jnp.dot(
    planes_XG, own_GP.astype(jnp.bfloat16), preferred_element_type=jnp.float32
  )
  low_ZP, high_ZP, inside_ZP = (
    (
      picked_XP[i : i + GROUP] + 256.0 * picked_XP[i + GROUP : i + 2 * GROUP]
    ).astype(jnp.int32)
    for i in range(0, 6 * GROUP, 2 * GROUP)
  )
  started_ZP = inside_ZP <= left_1P
  word_1P = jnp.sum(started_ZP.astype(jnp.int32), axis=0, keepdims=True) - 1
  here_ZP = lax.broadcasted_iota(jnp.int32, inside_ZP.shape, 0) == word_1P
  bits_1P = _picked(here_ZP, low_ZP) | (_picked(here_ZP, high_ZP) << 16)
  bit_1P = bitmask.nth_set_bit(bits_1P, left_1P - _picked(here_ZP, inside_ZP))
  index_1P = (group_1P * GROUP + word_1P) * bitmask.BITS + bit_1P
  return jnp.where(rank_1P < total_11, index_1P, -1)


def _picked(one_XP, x_XP):
  """Takes the one element of each column that is marked; 0 if none is."""
  return jnp.sum(jnp.where(one_XP, x_XP, 0), axis=0, keepdims=True)


def _below(size):
  """Bool [size,size]: whether the column is below the row."""
  shape = (size, size)
  return lax.broadcasted_iota(jnp.int32, shape, 1) < lax.broadcasted_iota(
    jnp.int32, shape, 0
  )
