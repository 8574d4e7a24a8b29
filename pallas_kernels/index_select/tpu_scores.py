"""Scores of one block of 256 keys on TPU, as sortable int32 codes.

The keys [Z,K] stream through the matrix units, whose stationary operand is the
queries of one or two groups of heads: 128 or 256 columns (group, query). Each
product of 128 columns is rectified, weighted and added to the block's scores,
[Z,L] float32 in 32 registers. Where lanes hold several groups of heads their
sums are added by lane rotations, and the codes of a block for each group are
put side by side.
"""
# I index heads, K index width, C queries of a tile, G lane groups,
# L lanes (G, C), X one or two times L, Z rows of a block

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels.index_select import order
from pallas_kernels.index_select import tpu_search

LANES = tpu_search.LANES
BLOCK = tpu_search.BLOCK


class Sizes(NamedTuple):
  """Static sizes of one call.

  Attributes:
    queries: C, queries of a tile.
    tile: rows of the scores for each key tile.
    heads: I.
    width: K, a multiple of 128.
    top_k: how many keys to select.
    dtype: of the factors of a matrix product.
  """

  queries: int
  tile: int
  heads: int
  width: int
  top_k: int
  dtype: jnp.dtype

  @property
  def groups(self):
    return LANES // self.queries

  @property
  def precision(self):
    # Products of bfloat16 are exact in float32 as they are.
    if self.dtype == jnp.bfloat16:
      return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST


class Inputs(NamedTuple):
  """Blocks of a step; None where an input is not given."""

  query: jax.Ref
  weight: jax.Ref
  slots: jax.Ref
  query_segments: jax.Ref | None
  key: jax.Ref
  key_segments: jax.Ref | None
  scale: jax.Ref | None


def codes(sizes, inputs, block, at):
  """Returns the encoded scores [Z,L] of a block of 256 keys for each group."""
  lane_ZL = lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 1)
  row_ZL = lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 0)
  group_ZL = tpu_search.group_of(lane_ZL, sizes.queries)
  index_ZL = bitmask.BITS * (row_ZL & 7) + (row_ZL >> 3) + BLOCK * group_ZL
  base = at * BLOCK * sizes.groups
  allowed_ZL = index_ZL <= inputs.slots[0, 0] - base
  score_ZL = segments_ZL = None
  for group in range(sizes.groups):
    rows = block * sizes.groups + group
    own_ZL = _scores(sizes, inputs, rows)
    score_ZL = _where(group, group_ZL == group, own_ZL, score_ZL)
    if inputs.key_segments is not None:
      own_ZL = _column(inputs.key_segments, rows)
      segments_ZL = _where(group, group_ZL == group, own_ZL, segments_ZL)
  if segments_ZL is not None:
    allowed_ZL &= segments_ZL == inputs.query_segments[0, 0]
  return jnp.where(allowed_ZL, order.encode(score_ZL), order.HIDDEN)


def _where(group, mask, new, old):
  return new if group == 0 else jnp.where(mask, new, old)


def _scores(sizes, inputs, rows):
  """Returns the scores [Z,L] of one block of 256 keys, the same in all groups.

  Two products of 128 lanes at a time: the matrix units of some generations are
  256 wide.
  """
  key_ZK = inputs.key[0, tpu_search.rows(rows), :].astype(sizes.dtype)
  head_groups = -(-sizes.heads // sizes.groups)
  score_ZL = jnp.zeros((BLOCK, LANES), jnp.float32)
  for first in range(0, head_groups, 2):
    pair = range(first, min(first + 2, head_groups))
    query_XK = jnp.concatenate([_queries(sizes, inputs, j) for j in pair])
    dot_ZX = lax.dot_general(
      key_ZK,
      query_XK.astype(sizes.dtype),
      (((1,), (1,)), ((), ())),
      precision=sizes.precision,
      preferred_element_type=jnp.float32,
    )
    for i, j in enumerate(pair):
      dot_ZL = dot_ZX[:, i * LANES : (i + 1) * LANES]
      term_ZL = jnp.maximum(dot_ZL, 0.0) * inputs.weight[0, 0, j : j + 1, :]
      heads_left = sizes.heads - j * sizes.groups
      if heads_left < sizes.groups:
        # No head: an infinite key would make NaN of zero weights.
        lane_ZL = lax.broadcasted_iota(jnp.int32, term_ZL.shape, 1)
        is_head_ZL = lane_ZL < heads_left * sizes.queries
        term_ZL = jnp.where(is_head_ZL, term_ZL, 0.0)
      score_ZL = score_ZL + term_ZL
  score_ZL = tpu_search.over_groups(sizes.queries, jnp.add, score_ZL)
  if inputs.scale is not None:
    score_ZL = score_ZL * _column(inputs.scale, rows)
  return score_ZL


def _queries(sizes, inputs, j):
  """Returns the queries [L,K] of the j-th group of heads."""
  heads = [
    min(j * sizes.groups + g, sizes.heads - 1) for g in range(sizes.groups)
  ]
  return jnp.concatenate(
    [inputs.query[0, :, i * sizes.width : (i + 1) * sizes.width] for i in heads]
  )


def _column(ref, rows):
  """Returns [Z,L] with one value a key, from keys along lanes [1,R,L]."""
  halves = [
    jnp.broadcast_to(ref[0, pl.ds(rows * 2 + i, 1), :], (LANES, LANES)).T
    for i in range(BLOCK // LANES)
  ]
  return jnp.concatenate(halves)
