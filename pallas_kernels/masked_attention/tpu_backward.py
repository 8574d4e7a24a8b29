"""Masked attention on TPU, backward: one pass with five products a tile.

The grid is (blocks of heads, items of work). An item is one tile of keys with
one tile of queries that needs it (see `tpu_tiles`); items of one key tile
follow one another. Scores stand with keys as rows, so that the log-sum-exp and
the mean are rows of lanes and nothing is reduced: for each head of the block
  weights = exp(k q^T - lse), d_weights = v d_out^T,
  d_scores = weights * (d_weights - mean),
  d_value += weights d_out, d_key += d_scores q, d_query += d_scores^T k.
The gradients of a key tile gather in float32 scratch and are written after its
last item; those of the queries stay in VMEM, float32, for all items of a batch
element.

Memory of a step: the double-buffered blocks of query, key, value, d_out and the
gradients of key and value, four float32 tiles of keys x queries a head, scratch
of keys x (Q + V) float32 a head, and twice the d_query of all queries of a
head; so a call takes at most 8 MiB of it (8192 queries of 192), and more are
cut in several calls whose gradients of keys are added up in float32. Where
heads share a key head, each block of heads writes its own float32 gradient.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, R query tiles, C key tiles, D two rows: lse and mean. In
# a kernel T and S are a tile's queries and keys, H the heads of a step, J is
# 128 lanes, N items.

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.masked_attention import tpu
from pallas_kernels.masked_attention import tpu_tiles

LANES = tpu_tiles.LANES

# Largest tiles, heads of a step, and bytes of a head's d_query in VMEM.
QUERIES, KEYS, HEADS = 256, 1024, 1
_D_QUERY_BYTES = 2**23


def backward(
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  visible,
  scale,
  out_BTHV,
  lse_BTH,
  d_out_BTHV,
  *,
  interpret=False,
):
  """Returns the gradients of query, key and value in their dtypes."""
  *visible_BT, key_segments_BS = visible
  mean_BTH = jnp.sum(
    d_out_BTHV.astype(jnp.float32) * out_BTHV.astype(jnp.float32), axis=-1
  )
  arrays_BT = (query_BTHQ, d_out_BTHV, lse_BTH, mean_BTH, *visible_BT)
  queries, width = query_BTHQ.shape[1], query_BTHQ.shape[3]
  row_bytes = 4 * LANES * -(-width // LANES)
  most = max(1, _D_QUERY_BYTES // (row_bytes * QUERIES)) * QUERIES
  # What several blocks of heads or calls add up stays float32 until the end.
  summed = key_BSGQ.shape[2] == 1 or queries > most
  calls = []
  for start in range(0, queries, most):
    query, d_out, lse, mean, *cut_visible = (
      None if x is None else x[:, start : start + most] for x in arrays_BT
    )
    calls.append(
      _call(
        (query, key_BSGQ, value_BSGV, d_out),
        (lse, mean),
        (*cut_visible, key_segments_BS),
        scale,
        (jnp.float32,) * 2 if summed else (key_BSGQ.dtype, value_BSGV.dtype),
        interpret,
      )
    )
  d_query, d_key, d_value = zip(*calls, strict=True)
  return (
    jnp.concatenate(d_query, axis=1).astype(query_BTHQ.dtype),
    sum(d_key).astype(key_BSGQ.dtype),
    sum(d_value).astype(value_BSGV.dtype),
  )


def _call(arrays, statistics, visible, scale, dtypes, interpret):
  """Returns the gradients from the queries of one call.

  Args:
    arrays: query, key, value and d_out.
    statistics: lse and mean, float32 [B,T,H].
    visible: as the front has it.
    scale: factor of the scores.
    dtypes: of the gradients of key and value; that of query is float32.
    interpret: as `pallas_call` takes it.
  """
  query_BTHQ, key_BSGQ, value_BSGV, d_out_BTHV = arrays
  queries, heads, width = query_BTHQ.shape[1:]
  num_keys, key_heads, value_width = value_BSGV.shape[1:]
  sizes = tpu_tiles.choose_sizes(
    query_BTHQ.shape, num_keys, QUERIES, KEYS, HEADS
  )
  work, hiding, packed = _list_work(sizes, num_keys, visible, interpret)
  rows = sizes.batch * sizes.query_tiles * sizes.queries
  columns = sizes.batch * sizes.key_tiles * sizes.keys
  blocks = heads // sizes.heads if key_heads == 1 else heads
  d_query_HTQ, d_key_GSQ, d_value_GSV = pl.pallas_call(
    functools.partial(_kernel, sizes=sizes, scale=scale, packed=packed),
    grid_spec=_grid_spec(
      sizes, work, heads, key_heads, width, value_width, packed=packed
    ),
    out_shape=(
      jax.ShapeDtypeStruct((heads, rows, width), jnp.float32),
      jax.ShapeDtypeStruct((blocks, columns, width), dtypes[0]),
      jax.ShapeDtypeStruct((blocks, columns, value_width), dtypes[1]),
    ),
    compiler_params=tpu.compiler_params(),
    # Scores, d_weight, and the gradients of query, key and value.
    cost_estimate=tpu_tiles.cost(
      sizes, heads, (width, value_width, width, width, value_width)
    ),
    interpret=interpret,
    name="masked_attention_backward",
  )(
    work.items_N,
    tpu_tiles.head_major(query_BTHQ, sizes.query_tiles, sizes.queries),
    tpu_tiles.head_major(key_BSGQ, sizes.key_tiles, sizes.keys),
    tpu_tiles.head_major(value_BSGV, sizes.key_tiles, sizes.keys),
    tpu_tiles.head_major(d_out_BTHV, sizes.query_tiles, sizes.queries),
    _rows(sizes, *statistics),
    hiding,
  )
  if key_heads == 1:
    d_key_GSQ = jnp.sum(d_key_GSQ, axis=0, keepdims=True)
    d_value_GSV = jnp.sum(d_value_GSV, axis=0, keepdims=True)
  return (
    tpu_tiles.batch_major(d_query_HTQ, sizes.batch, queries) * scale,
    tpu_tiles.batch_major(d_key_GSQ, sizes.batch, num_keys),
    tpu_tiles.batch_major(d_value_GSV, sizes.batch, num_keys),
  )


def _list_work(sizes, num_keys, visible, interpret):
  """Returns the work by key tile, what hides keys, and whether it is packed."""
  slots_BT = tpu_tiles.padded_slots(sizes, visible[0], num_keys)
  words_BTUJ = tpu_tiles.span_words(
    sizes, slots_BT, num_keys, visible, interpret
  )
  kinds_BRC = tpu_tiles.kinds(sizes, slots_BT, words_BTUJ).reshape(
    sizes.batch, sizes.query_tiles, sizes.key_tiles
  )
  work = tpu_tiles.list_work(
    kinds_BRC.swapaxes(1, 2).reshape(-1, sizes.query_tiles)
  )
  if words_BTUJ is None:
    return work, slots_BT.reshape(-1, 1, sizes.queries), False
  words_BUJT = words_BTUJ.transpose(0, 2, 3, 1)
  return work, words_BUJT.reshape(-1, slots_BT.shape[1]), True


def _rows(sizes, lse_BTH, mean_BTH):
  """Lays lse, in powers of two, and mean along lanes: float32 [H,R,D,T]."""
  # An unseen query has lse -inf; with 0 its hidden scores still give exp 0.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH) * tpu.LOG2_E
  missing = sizes.query_tiles * sizes.queries - lse_BTH.shape[1]
  rows_DBTH = jnp.pad(
    jnp.stack((lse_BTH, mean_BTH)), ((0, 0), (0, 0), (0, missing), (0, 0))
  )
  rows_HDBT = rows_DBTH.transpose(3, 0, 1, 2)
  return rows_HDBT.reshape(*rows_HDBT.shape[:2], -1, sizes.queries).swapaxes(
    1, 2
  )


def _grid_spec(sizes, work, heads, key_heads, width, value_width, *, packed):
  """Returns the grid (head blocks, items), its blocks and its scratch."""
  tile_queries, tile_keys = sizes.queries, sizes.keys
  block_key_heads = 1 if key_heads == 1 else sizes.heads
  batch_queries = sizes.query_tiles * tile_queries

  def batch_of(item):
    return lax.div(tpu_tiles.row_of(item), sizes.key_tiles)

  def query_tile(item):
    return batch_of(item) * sizes.query_tiles + tpu_tiles.column_of(item)

  def rows_index(h, n, items_N):
    return h, query_tile(items_N[n]), 0, 0

  def query_index(h, n, items_N):
    return rows_index(h, n, items_N)[:3]

  def d_key_index(h, n, items_N):
    return h, tpu_tiles.row_of(items_N[n]), 0

  def key_index(h, n, items_N):
    return d_key_index(0 if key_heads == 1 else h, n, items_N)

  def d_query_index(h, n, items_N):
    return h, batch_of(items_N[n]), 0

  def slots_index(h, n, items_N):
    return rows_index(h, n, items_N)[1:]

  def words_index(h, n, items_N):
    del h
    item = items_N[n]
    batch = batch_of(item)
    tile = tpu_tiles.row_of(item) - batch * sizes.key_tiles
    spans = -(-sizes.key_tiles // sizes.span_tiles)
    span = batch * spans + lax.div(tile, sizes.span_tiles)
    return span, tpu_tiles.column_of(item)

  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(heads // sizes.heads, work.count),
    in_specs=[
      pl.BlockSpec((sizes.heads, tile_queries, width), query_index),
      pl.BlockSpec((block_key_heads, tile_keys, width), key_index),
      pl.BlockSpec((block_key_heads, tile_keys, value_width), key_index),
      pl.BlockSpec((sizes.heads, tile_queries, value_width), query_index),
      pl.BlockSpec((sizes.heads, None, 2, tile_queries), rows_index),
      pl.BlockSpec((LANES, tile_queries), words_index)
      if packed
      else pl.BlockSpec((None, 1, tile_queries), slots_index),
    ],
    out_specs=[
      pl.BlockSpec((sizes.heads, batch_queries, width), d_query_index),
      pl.BlockSpec((block_key_heads, tile_keys, width), d_key_index),
      pl.BlockSpec((block_key_heads, tile_keys, value_width), d_key_index),
    ],
    scratch_shapes=[
      pltpu.VMEM((block_key_heads, tile_keys, width), jnp.float32),
      pltpu.VMEM((block_key_heads, tile_keys, value_width), jnp.float32),
    ],
  )


class _Refs(NamedTuple):
  """Blocks and scratch of a step."""

  query_HTQ: jax.Array
  key_GSQ: jax.Array
  value_GSV: jax.Array
  d_out_HTV: jax.Array
  rows_HDT: jax.Array
  hiding: jax.Array
  d_query_HTQ: jax.Array
  d_key_GSQ: jax.Array
  d_value_GSV: jax.Array
  key_sum_GSQ: jax.Array
  value_sum_GSV: jax.Array


def _kernel(items_N, *blocks, sizes, scale, packed):
  """Works on one item for the heads of a step."""
  refs = _Refs(*blocks)
  item = items_N[pl.program_id(1)]
  kind = tpu_tiles.kind_of(item)
  tile = lax.rem(tpu_tiles.row_of(item), sizes.key_tiles)
  first = tpu_tiles.is_first(item)
  start = tpu_tiles.column_of(item) * sizes.queries
  at = pl.ds(pl.multiple_of(start, sizes.queries), sizes.queries)

  @pl.when(first & (tile == 0))
  def _():
    refs.d_query_HTQ[...] = jnp.zeros(refs.d_query_HTQ.shape, jnp.float32)

  @pl.when(first)
  def _():
    for sum_ref in (refs.key_sum_GSQ, refs.value_sum_GSV):
      sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  @pl.when(kind == tpu_tiles.WHOLE)
  def _():
    _add_item(refs, at, scale, lambda score_ST: score_ST)

  @pl.when(kind == tpu_tiles.PARTIAL)
  def _():
    hide = functools.partial(_hide, sizes, tile, refs.hiding[...], packed)
    _add_item(refs, at, scale, hide)

  @pl.when(tpu_tiles.is_last(item))
  def _():
    d_key_GSQ = refs.key_sum_GSQ[...] * scale
    refs.d_key_GSQ[...] = d_key_GSQ.astype(refs.d_key_GSQ.dtype)
    d_value_GSV = refs.value_sum_GSV[...]
    refs.d_value_GSV[...] = d_value_GSV.astype(refs.d_value_GSV.dtype)


def _add_item(refs, at, scale, hide):
  """Adds a tile's share to the gradients of all heads of a step."""
  for head in range(refs.query_HTQ.shape[0]):
    key_head = 0 if refs.key_GSQ.shape[0] == 1 else head
    d_query_TQ, d_key_SQ, d_value_SV = _gradients(
      refs.query_HTQ[head],
      refs.key_GSQ[key_head],
      refs.value_GSV[key_head],
      refs.d_out_HTV[head],
      refs.rows_HDT[head],
      scale * tpu.LOG2_E,
      hide,
    )
    refs.d_query_HTQ[head, at, :] += d_query_TQ
    refs.key_sum_GSQ[key_head] += d_key_SQ
    refs.value_sum_GSV[key_head] += d_value_SV


def _gradients(query_TQ, key_SQ, value_SV, d_out_TV, rows_DT, scale, hide):
  """Returns one head's (d_query, d_key) / scale and d_value for one item."""
  score_ST = hide(tpu.dot(key_SQ, query_TQ, (1, 1)) * scale)
  weight_ST = jnp.exp2(score_ST - rows_DT[:1])
  d_weight_ST = tpu.dot(value_SV, d_out_TV, (1, 1))
  d_score_ST = weight_ST * (d_weight_ST - rows_DT[1:])
  d_score_ST = d_score_ST.astype(key_SQ.dtype)
  return (
    tpu.dot(d_score_ST, key_SQ, (0, 0)),
    tpu.dot(d_score_ST, query_TQ, (1, 0)),
    tpu.dot(weight_ST.astype(d_out_TV.dtype), d_out_TV, (1, 0)),
  )


def _hide(sizes, tile, hiding, packed, score_ST):
  """Sets the scores of hidden keys to `HIDDEN`, 128 keys at a time."""
  row_JT = lax.broadcasted_iota(jnp.int32, (LANES, sizes.queries), 0)
  parts = []
  for n in range(sizes.keys // LANES):
    if packed:
      start = lax.rem(tile, sizes.span_tiles) * (sizes.keys // LANES)
      bit = jnp.int32(1) << (start + n)
      seen_JT = hiding & bit != 0
    else:
      seen_JT = row_JT + (tile * sizes.keys + n * LANES) <= hiding
    score_JT = score_ST[n * LANES : (n + 1) * LANES]
    parts.append(jnp.where(seen_JT, score_JT, tpu.HIDDEN))
  return jnp.concatenate(parts, axis=0)
