"""Scores and exact selection in plain XLA, shaped for CPUs.

Queries go in chunks of 16 to 64, so that a chunk's scores stay in the cache:
- Scores: a loop over key tiles up to the chunk's last visible key (a dynamic
  trip count). A tile is one matrix product over all heads of a group, then one
  fused pass that applies ReLU, weights and the head sum, and writes the score
  as an int32 that sorts like the float (`order.encode`); keys that a query may
  not see get the lowest int32.
- Selection: `search.best` finds a threshold for each row.
One or two queries, as in decoding, go another way: `few`.

Memory a step: [C,S] int32 and, for 8 heads, tiles [8,C,256] of float32.
"""
# B batch, T queries, S keys, I index heads, K index width, C queries of a
# chunk, P padded keys, W words of 32 keys, Z keys of a tile, N groups of heads

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import tiles
from pallas_kernels.index_select import few
from pallas_kernels.index_select import order
from pallas_kernels.index_select import search

# Most bytes of a chunk's scores, and bounds of its queries.
CHUNK_BYTES = 2**20
MIN_CHUNK, MAX_CHUNK = 16, 64
TILE = search.TILE
FEW_QUERIES = 2


class _Keys(NamedTuple):
  """The keys of one batch row, or of all with a leading axis B."""

  key_PK: jax.Array
  segments_P: jax.Array | None
  scale_P: jax.Array | None


class _Queries(NamedTuple):
  """Queries of one batch row, of all, or of one chunk (C for T)."""

  query_TIK: jax.Array
  weight_TI: jax.Array
  slots_T: jax.Array
  segments_T: jax.Array | None


class _Wanted(NamedTuple):
  """What is asked for; static."""

  top_k: int
  num_keys: int
  mask: bool
  indices: bool


def select(
  query_BTIK,
  key_BSK,
  weight_BTI,
  slots_BT,
  query_segments_BT,
  key_segments_BS,
  key_scale_BS,
  *,
  top_k,
  want_mask,
  want_indices,
):
  """Returns the fields of `Selected` in order; see the front."""
  num_queries, num_keys = query_BTIK.shape[1], key_BSK.shape[1]
  slots_BT = jnp.minimum(slots_BT, num_keys - 1)
  if num_queries <= FEW_QUERIES and query_segments_BT is None:
    return few.select(
      query_BTIK,
      key_BSK,
      weight_BTI,
      slots_BT,
      key_scale_BS,
      top_k=top_k,
      want_mask=want_mask,
      want_indices=want_indices,
    )
  wanted = _Wanted(top_k, num_keys, want_mask, want_indices)
  padded_keys = -(-num_keys // TILE) * TILE
  chunk = min(max(CHUNK_BYTES // (4 * padded_keys), MIN_CHUNK), MAX_CHUNK)
  chunk = min(chunk, num_queries)
  padded_queries = -(-num_queries // chunk) * chunk
  keys = _Keys(key_BSK.astype(jnp.float32), key_segments_BS, key_scale_BS)
  keys = jax.tree.map(lambda x: tiles.pad(x, padded_keys), keys)
  queries = _Queries(
    query_BTIK.astype(jnp.float32),
    weight_BTI.astype(jnp.float32),
    slots_BT + 1,
    query_segments_BT,
  )
  queries = jax.tree.map(lambda x: tiles.pad(x, padded_queries), queries)
  queries = queries._replace(slots_T=queries.slots_T - 1)
  row = functools.partial(_row, chunk, wanted)
  outputs = lax.map(lambda x: row(*x), (queries, keys))
  return jax.tree.map(lambda x: x[:, :num_queries], outputs)


def _row(chunk, wanted, queries, keys):
  """Selects for the queries of one batch row, chunk after chunk."""
  num_queries, padded_keys = queries.slots_T.shape[0], keys.key_PK.shape[0]

  def body(ordered_CP, own):
    num_tiles = jnp.maximum(jnp.max(own.slots_T), 0) // TILE + 1
    ordered_CP = _scores(ordered_CP, own, keys, num_tiles)
    block = search.Block(ordered_CP, num_tiles)
    return ordered_CP, _outputs(block, wanted)

  ordered_CP = jnp.full((chunk, padded_keys), order.HIDDEN, jnp.int32)
  chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), queries)
  _, outputs = lax.scan(body, ordered_CP, chunks)
  return jax.tree.map(lambda x: x.reshape(num_queries, *x.shape[2:]), outputs)


def _scores(ordered_CP, own, keys, num_tiles):
  """Writes the encoded scores of the visible tiles into ordered_CP."""
  query_NGCK = tiles.group_heads(own.query_TIK)
  weight_NGC = tiles.group_heads(own.weight_TI)

  def body(tile, ordered_CP):
    start = tile * TILE
    key_ZK = lax.dynamic_slice_in_dim(keys.key_PK, start, TILE)
    score_CZ = tiles.index_scores(query_NGCK, weight_NGC, key_ZK)
    if keys.scale_P is not None:
      score_CZ = score_CZ * lax.dynamic_slice_in_dim(keys.scale_P, start, TILE)
    allowed_CZ = start + jnp.arange(TILE) <= own.slots_T[:, None]
    if own.segments_T is not None:
      segments_Z = lax.dynamic_slice_in_dim(keys.segments_P, start, TILE)
      allowed_CZ &= own.segments_T[:, None] == segments_Z
    ordered_CZ = jnp.where(allowed_CZ, order.encode(score_CZ), order.HIDDEN)
    return lax.dynamic_update_slice(ordered_CP, ordered_CZ, (0, start))

  return lax.fori_loop(0, num_tiles, body, ordered_CP)


def _outputs(block, wanted):
  """Returns the fields of `Selected` for one chunk."""
  cut = search.best(block, wanted.top_k)
  mask_CW = indices_CN = None
  if wanted.mask or wanted.indices:
    index_P = jnp.arange(block.ordered_CP.shape[1], dtype=jnp.int32)
    mask_CP = cut.holds(block.ordered_CP, index_P)
    # Tiles that this chunk did not write hold the scores of an earlier one.
    mask_CP &= index_P < block.num_tiles * TILE
    words = bitmask.num_words(wanted.num_keys)
    mask_CW = bitmask.pack(mask_CP)[:, :words]
  if wanted.indices:
    indices_CN = bitmask.to_indices(mask_CW, wanted.top_k, wanted.num_keys)
  everything = cut._replace(
    value_C=jnp.where(cut.invalid_C, order.NAN, order.HIDDEN),
    end_C=jnp.zeros_like(cut.end_C),
  )
  return (
    mask_CW if wanted.mask else None,
    indices_CN,
    _log_sum_exp(block, everything),
    _log_sum_exp(block, cut),
    cut.invalid_C,
  )


def _log_sum_exp(block, cut):
  """Returns the log-sum-exp of the selected scores, -inf if there are none."""
  best_C = search.fold(
    block,
    lambda x_CZ, _: x_CZ,
    jnp.maximum,
    jnp.max,
    jnp.full_like(cut.value_C, order.HIDDEN),
  )
  seen_C = (best_C > order.HIDDEN) & ~cut.invalid_C
  top_C = jnp.where(seen_C, order.decode(best_C), 0.0)
  top_C = jnp.where(jnp.isfinite(top_C), top_C, 0.0)

  def term(x_CZ, index_Z):
    power_CZ = jnp.exp(order.decode(x_CZ) - top_C[:, None])
    return jnp.where(cut.holds(x_CZ, index_Z), power_CZ, 0.0)

  total_C = search.fold(block, term, jnp.add, jnp.sum, jnp.zeros_like(top_C))
  return jnp.where(seen_C, jnp.log(total_C) + top_C, -jnp.inf)
