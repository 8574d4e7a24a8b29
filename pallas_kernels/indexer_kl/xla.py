"""The KL loss over masked keys in plain XLA, shaped for CPUs.

Queries go in chunks of at most 64, keys in tiles up to the chunk's last visible
key (a dynamic trip count). For each chunk:
1. Fill two blocks [C,P], tile by tile: the unnormalised target mass
   m = sum_h exp(scale q_h . k - lse_h) and the index score, with 0 and -inf at
   the keys outside the set.
2. Reduce them: with M = sum m and Z = log-sum-exp(score),
   kl = (sum m log m - sum m score) / M - log M + Z.
3. Only for a gradient: the slope dkl/dscore = softmax(score) - m / M. With
   gate_i = [q_i . k > 0] and u_i = sum_s slope gate_i k_s,
   dkl/dq_i = w_i u_i, dkl/dw_i = q_i . u_i and
   dkl/dk_s = sum_i slope gate_i w_i q_i:
   two matrix products on one gated block, and no reduction along keys.

Memory a step: two float blocks [64,S] and, for 8 heads, tiles [8,64,256].
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# Q query width, C queries of a chunk, P padded keys, Z keys of a tile, N groups
# of G heads, W words of 32 keys

import functools
import operator
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import tiles

CHUNK = 64
TILE = 256


class _Keys(NamedTuple):
  """The keys of one batch row, or of all with a leading axis B."""

  index_PK: jax.Array
  attention_HPQ: jax.Array
  segments_P: jax.Array | None


class _Queries(NamedTuple):
  """Queries of one batch row; lse is +inf for a head that sees nothing."""

  index_TIK: jax.Array
  weight_TI: jax.Array
  attention_THQ: jax.Array
  lse_TH: jax.Array
  slots_T: jax.Array
  mask_TW: jax.Array | None
  segments_T: jax.Array | None
  cotangent_T: jax.Array | None


class _Sums(NamedTuple):
  """What step 2 leaves of a chunk; `mass` is 0 for an empty set."""

  kl_C: jax.Array
  mass_C: jax.Array
  lse_C: jax.Array


def evaluate(scale, trained, constants, weight_BT):
  """Returns (kl_BT, gradients of sum(weight kl) by `trained`, or None)."""
  query_BTIK, key_BSK, weight_BTI = trained
  query_BTHQ, key_BSGQ, lse_BTH, slots_BT, mask_BTW, segments, key_segments = (
    constants
  )
  num_queries, num_keys = slots_BT.shape[1], key_BSK.shape[1]
  padded_keys = -(-num_keys // TILE) * TILE
  chunk = min(CHUNK, num_queries)
  padded_queries = -(-num_queries // chunk) * chunk
  keys = _Keys(
    tiles.pad(key_BSK.astype(jnp.float32), padded_keys),
    jnp.swapaxes(tiles.pad(key_BSGQ, padded_keys), 1, 2).astype(jnp.float32),
    tiles.pad(key_segments, padded_keys),
  )
  queries = _Queries(
    query_BTIK.astype(jnp.float32),
    weight_BTI.astype(jnp.float32),
    scale * query_BTHQ.astype(jnp.float32),
    jnp.where(lse_BTH == -jnp.inf, jnp.inf, lse_BTH),
    jnp.minimum(slots_BT, num_keys - 1) + 1,
    mask_BTW,
    segments,
    weight_BT,
  )
  queries = jax.tree.map(lambda x: tiles.pad(x, padded_queries), queries)
  queries = queries._replace(slots_T=queries.slots_T - 1)
  row = functools.partial(_row, chunk)
  kl_BT, gradients = lax.map(lambda x: row(*x), (queries, keys))
  kl_BT = kl_BT[:, :num_queries]
  if weight_BT is None:
    return kl_BT, None
  query_BTIK, key_BPK, weight_BTI = gradients
  gradients = (
    query_BTIK[:, :num_queries],
    key_BPK[:, :num_keys],
    weight_BTI[:, :num_queries],
  )
  cast = zip(gradients, trained, strict=True)
  return kl_BT, tuple(got.astype(like.dtype) for got, like in cast)


def _row(chunk, queries, keys):
  """Returns kl_T and, given cotangents, the gradients of one batch row."""
  num_queries, padded_keys = queries.slots_T.shape[0], keys.index_PK.shape[0]
  block_CP = jnp.zeros((chunk, padded_keys), jnp.float32)

  def body(carry, start):
    blocks, key_gradient_PK = carry
    own = jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, chunk), queries
    )
    num_tiles = jnp.maximum(jnp.max(own.slots_T), 0) // TILE + 1
    blocks = _fill(own, keys, blocks, num_tiles)
    sums = _reduce(blocks, num_tiles)
    if own.cotangent_T is None:
      return (blocks, key_gradient_PK), (sums.kl_C, None)
    key_gradient_PK, gradients = _gradients(
      own, keys, blocks, sums, key_gradient_PK, num_tiles
    )
    return (blocks, key_gradient_PK), (sums.kl_C, gradients)

  carry = (block_CP, block_CP), jnp.zeros_like(keys.index_PK)
  starts = jnp.arange(0, num_queries, chunk)
  (_, key_gradient_PK), outputs = lax.scan(body, carry, starts)
  kl_T, gradients = jax.tree.map(
    lambda x: x.reshape(num_queries, *x.shape[2:]), outputs
  )
  if queries.cotangent_T is None:
    return kl_T, None
  query_TIK, weight_TI = gradients
  return kl_T, (query_TIK, key_gradient_PK, weight_TI)


def _fill(own, keys, blocks, num_tiles):
  """Step 1: writes the target mass and the scores of the visible tiles."""
  query_NGCK = tiles.group_heads(own.index_TIK)
  weight_NGC = tiles.group_heads(own.weight_TI)

  def body(index, blocks):
    mass_CP, score_CP = blocks
    start = index * TILE
    key_ZK = lax.dynamic_slice_in_dim(keys.index_PK, start, TILE)
    score_CZ = tiles.index_scores(query_NGCK, weight_NGC, key_ZK)
    visible_CZ = _visible(own, keys, start)
    mass_CZ = jnp.where(visible_CZ, _mass(own, keys, start), 0.0)
    score_CZ = jnp.where(visible_CZ, score_CZ, -jnp.inf)
    return (
      lax.dynamic_update_slice(mass_CP, mass_CZ, (0, start)),
      lax.dynamic_update_slice(score_CP, score_CZ, (0, start)),
    )

  return lax.fori_loop(0, num_tiles, body, blocks)


def _mass(own, keys, start):
  """Sums exp(scale q . k - lse) over the heads, for one tile: [C,Z]."""
  key_HZQ = lax.dynamic_slice_in_dim(keys.attention_HPQ, start, TILE, axis=1)
  groups = [
    tiles.group_heads(own.attention_THQ),
    tiles.group_heads(own.lse_TH),
  ]
  if key_HZQ.shape[0] > 1:
    group_shape = (*groups[1].shape[:2], *key_HZQ.shape[1:])
    groups.append(key_HZQ.reshape(group_shape))

  def group(arrays):
    query_GCQ, lse_GC, *own_key = arrays
    if own_key:
      dot_GCZ = jnp.einsum(
        "GCQ,GZQ->GCZ", query_GCQ, *own_key, precision=lax.Precision.HIGHEST
      )
    else:
      dot_GCZ = tiles.dots(query_GCQ, key_HZQ[0])
    terms = [
      jnp.exp(dot_CZ - lse_C[:, None])
      for dot_CZ, lse_C in zip(dot_GCZ, lse_GC, strict=True)
    ]
    return functools.reduce(operator.add, terms)

  return tiles.sum_groups(group, groups)


def _visible(own, keys, start):
  """Returns which keys of a tile are in the set of each query, bool [C,Z]."""
  visible_CZ = start + jnp.arange(TILE) <= own.slots_T[:, None]
  if own.segments_T is not None:
    segments_Z = lax.dynamic_slice_in_dim(keys.segments_P, start, TILE)
    visible_CZ &= own.segments_T[:, None] == segments_Z
  if own.mask_TW is not None:
    words = TILE // bitmask.BITS
    padding = keys.index_PK.shape[0] // bitmask.BITS - own.mask_TW.shape[1]
    mask_CW = jnp.pad(own.mask_TW, [(0, 0), (0, padding)])
    mask_CW = lax.dynamic_slice_in_dim(
      mask_CW, start // bitmask.BITS, words, axis=1
    )
    visible_CZ &= bitmask.unpack(mask_CW, TILE)
  return visible_CZ


def _reduce(blocks, num_tiles):
  """Step 2: returns the `_Sums` of a chunk."""
  zeros_C = jnp.zeros(blocks[0].shape[0], jnp.float32)

  def tile(index):
    return [
      lax.dynamic_slice_in_dim(block_CP, index * TILE, TILE, axis=1)
      for block_CP in blocks
    ]

  def best(index, best_C):
    _, score_CZ = tile(index)
    own_C = tiles.max_rows(lambda i, j: score_CZ[:, i:j], TILE)
    return jnp.maximum(best_C, own_C)

  best_C = lax.fori_loop(0, num_tiles, best, zeros_C - jnp.inf)
  best_C = jnp.where(best_C == -jnp.inf, 0.0, best_C)

  def add(index, sums):
    mass_CZ, score_CZ = tile(index)
    terms = (
      lambda m, s: m,
      lambda m, s: jnp.where(m > 0, m * jnp.log(m), 0.0),
      lambda m, s: jnp.where(m > 0, m * (s - best_C[:, None]), 0.0),
      lambda m, s: jnp.exp(s - best_C[:, None]),
    )
    return tuple(
      sum_C
      + tiles.sum_rows(
        lambda i, j, term=term: term(mass_CZ[:, i:j], score_CZ[:, i:j]), TILE
      )
      for sum_C, term in zip(sums, terms, strict=True)
    )

  mass_C, entropy_C, cross_C, total_C = lax.fori_loop(
    0, num_tiles, add, (zeros_C,) * 4
  )
  seen_C = mass_C != 0
  safe_mass_C = jnp.where(seen_C, mass_C, 1.0)
  log_total_C = jnp.log(jnp.where(total_C > 0, total_C, 1.0))
  kl_C = (entropy_C - cross_C) / safe_mass_C - jnp.log(safe_mass_C)
  kl_C = jnp.where(seen_C, kl_C + log_total_C, 0.0)
  return _Sums(kl_C, mass_C, best_C + log_total_C)


def _gradients(own, keys, blocks, sums, key_gradient_PK, num_tiles):
  """Step 3: adds to the keys' gradient; returns it and (query, weight)'s."""
  query_NGCK = tiles.group_heads(own.index_TIK)
  weight_NGC = tiles.group_heads(own.weight_TI)
  seen_C = sums.mass_C != 0
  scale_C = jnp.where(seen_C, 1 / jnp.where(seen_C, sums.mass_C, 1.0), 0.0)
  # An empty row has a gradient of zero: exp(score - inf) is zero everywhere.
  lse_C = jnp.where(seen_C, sums.lse_C, jnp.inf)
  pulled_NGC = weight_NGC * own.cotangent_T
  pulled_query_NGCK = query_NGCK * pulled_NGC[..., None]

  def body(index, carry):
    key_gradient_PK, u_NGCK = carry
    start = index * TILE
    key_ZK = lax.dynamic_slice_in_dim(keys.index_PK, start, TILE)
    mass_CZ, score_CZ = (
      lax.dynamic_slice_in_dim(block_CP, start, TILE, axis=1)
      for block_CP in blocks
    )
    slope_CZ = jnp.exp(score_CZ - lse_C[:, None]) - mass_CZ * scale_C[:, None]

    def group(sum_ZK, arrays):
      query_GCK, pulled_query_GCK = arrays
      dot_GCZ = tiles.dots(query_GCK, key_ZK)
      gated_GCZ = jnp.where(dot_GCZ > 0, slope_CZ, 0.0)
      u_GCK = jnp.einsum(
        "GCZ,ZK->GCK", gated_GCZ, key_ZK, precision=lax.Precision.HIGHEST
      )
      sum_ZK += jnp.einsum(
        "GCZ,GCK->ZK",
        gated_GCZ,
        pulled_query_GCK,
        precision=lax.Precision.HIGHEST,
      )
      return sum_ZK, u_GCK

    old_ZK = lax.dynamic_slice_in_dim(key_gradient_PK, start, TILE)
    new_ZK, more_NGCK = lax.scan(group, old_ZK, (query_NGCK, pulled_query_NGCK))
    key_gradient_PK = lax.dynamic_update_slice_in_dim(
      key_gradient_PK, new_ZK, start, axis=0
    )
    return key_gradient_PK, u_NGCK + more_NGCK

  carry = key_gradient_PK, jnp.zeros_like(query_NGCK)
  key_gradient_PK, u_NGCK = lax.fori_loop(0, num_tiles, body, carry)
  query_NGCK_gradient = u_NGCK * pulled_NGC[..., None]
  weight_NGC_gradient = jnp.sum(u_NGCK * query_NGCK, -1) * own.cotangent_T
  return key_gradient_PK, (
    _ungroup(query_NGCK_gradient),
    _ungroup(weight_NGC_gradient),
  )


def _ungroup(x_NGC):
  """Undoes `tiles.group_heads`: [N,G,C,...] -> [C,I,...]."""
  heads = x_NGC.shape[0] * x_NGC.shape[1]
  return jnp.swapaxes(x_NGC.reshape(heads, *x_NGC.shape[2:]), 0, 1)
