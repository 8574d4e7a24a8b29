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
head; so a call takes at most 8192 queries, and more are cut in several calls
whose gradients of keys are added up. Where heads share a key head each block of
heads writes its own float32 gradient of it.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, R query tiles, C key tiles, D two rows: lse and mean. In
# a kernel T and S are a tile's queries and keys, H the heads of a step, J is
# 128 lanes, N items.

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.masked_attention import tpu
from pallas_kernels.masked_attention import tpu_tiles

LANES = tpu_tiles.LANES

# Largest tiles, heads of a step, and queries of a call.
_QUERIES, _KEYS, _HEADS = 256, 1024, 1
_CALL_QUERIES = 8192


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
  slots_BT, mask_BTW, segments_BT, key_segments_BS = visible
  mean_BTH = jnp.sum(
    d_out_BTHV.astype(jnp.float32) * out_BTHV.astype(jnp.float32), axis=-1
  )
  calls = []
  for start in range(0, query_BTHQ.shape[1], _CALL_QUERIES):
    cut = lambda x, at=slice(start, start + _CALL_QUERIES): (
      None if x is None else x[:, at]
    )  # fmt: skip
    calls.append(
      _call(
        (cut(query_BTHQ), key_BSGQ, value_BSGV, cut(d_out_BTHV)),
        (cut(lse_BTH), cut(mean_BTH)),
        (cut(slots_BT), cut(mask_BTW), cut(segments_BT), key_segments_BS),
        scale,
        interpret,
      )
    )
  d_query, d_key, d_value = zip(*calls, strict=True)
  return (
    jnp.concatenate(d_query, axis=1).astype(query_BTHQ.dtype),
    sum(d_key).astype(key_BSGQ.dtype),
    sum(d_value).astype(value_BSGV.dtype),
  )


def _call(arrays, statistics, visible, scale, interpret):
  """Returns the gradients from at most `_CALL_QUERIES` queries.

  Args:
    arrays: query, key, value and d_out.
    statistics: lse and mean, float32 [B,T,H].
    visible: as the front has it.
    scale: factor of the scores.
    interpret: as `pallas_call` takes it.
  """
  query_BTHQ, key_BSGQ, value_BSGV, d_out_BTHV = arrays
  batch, queries, heads, width = query_BTHQ.shape
  num_keys, key_heads, value_width = value_BSGV.shape[1:]
  sizes = tpu_tiles.choose_sizes(
    query_BTHQ.shape, num_keys, _QUERIES, _KEYS, _HEADS
  )
  slots_BT = tpu_tiles.padded_slots(sizes, visible[0], num_keys)
  words_BTUJ = tpu_tiles.span_words(
    sizes, slots_BT, num_keys, visible, interpret
  )
  kinds_BRC = tpu_tiles.kinds(sizes, slots_BT, words_BTUJ).reshape(
    batch, sizes.query_tiles, sizes.key_tiles
  )
  work = tpu_tiles.list_work(
    kinds_BRC.swapaxes(1, 2).reshape(-1, sizes.query_tiles)
  )
  if words_BTUJ is None:
    hiding = slots_BT.reshape(-1, 1, sizes.queries)
  else:
    hiding = words_BTUJ.transpose(0, 2, 3, 1).reshape(-1, slots_BT.shape[1])
  lse_BTH, mean_BTH = statistics
  # An unseen query has lse -inf; with 0 its hidden scores still give exp 0.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH) * tpu.LOG2_E
  rows_HRDT = (
    tpu_tiles.head_major(
      jnp.stack((lse_BTH, mean_BTH), axis=-1), sizes.query_tiles, sizes.queries
    )
    .reshape(heads, -1, sizes.queries, 2)
    .swapaxes(2, 3)
  )
  shared = key_heads == 1
  blocks = heads // sizes.heads if shared else heads
  exact = jnp.float32 if shared or queries_cut(queries) else None
  padded_keys = sizes.key_tiles * sizes.keys
  d_query_HTQ, d_key_GSQ, d_value_GSV = pl.pallas_call(
    functools.partial(
      _kernel, sizes=sizes, scale=scale, packed=words_BTUJ is not None
    ),
    grid_spec=_grid_spec(
      sizes,
      work,
      heads,
      key_heads,
      width,
      value_width,
      packed=words_BTUJ is not None,
    ),
    out_shape=(
      jax.ShapeDtypeStruct((heads, slots_BT.size, width), jnp.float32),
      jax.ShapeDtypeStruct(
        (blocks, batch * padded_keys, width), exact or key_BSGQ.dtype
      ),
      jax.ShapeDtypeStruct(
        (blocks, batch * padded_keys, value_width), exact or value_BSGV.dtype
      ),
    ),
    compiler_params=tpu.compiler_params(),
    interpret=interpret,
    name="masked_attention_backward",
  )(
    work.items_N,
    tpu_tiles.head_major(query_BTHQ, sizes.query_tiles, sizes.queries),
    tpu_tiles.head_major(key_BSGQ, sizes.key_tiles, sizes.keys),
    tpu_tiles.head_major(value_BSGV, sizes.key_tiles, sizes.keys),
    tpu_tiles.head_major(d_out_BTHV, sizes.query_tiles, sizes.queries),
    rows_HRDT,
    hiding,
  )
  if shared:
    d_key_GSQ = jnp.sum(d_key_GSQ, axis=0, keepdims=True)
    d_value_GSV = jnp.sum(d_value_GSV, axis=0, keepdims=True)
  return (
    tpu_tiles.batch_major(d_query_HTQ, batch, queries) * scale,
    tpu_tiles.batch_major(d_key_GSQ, batch, num_keys),
    tpu_tiles.batch_major(d_value_GSV, batch, num_keys),
  )


def queries_cut(queries):
  """Whether that many queries take several calls."""
  return queries > _CALL_QUERIES


def _grid_spec(sizes, work, heads, key_heads, width, value_width, *, packed):
  """Returns the grid (head blocks, items), its blocks and its scratch."""
  tile_queries, tile_keys = sizes.queries, sizes.keys
  block_key_heads = 1 if key_heads == 1 else sizes.heads
  batch_queries = sizes.query_tiles * tile_queries

  def batch_of(item):
    return lax.div(tpu_tiles.row_of(item), sizes.key_tiles)

  def query_tile(item):
    return batch_of(item) * sizes.query_tiles + tpu_tiles.column_of(item)

  def query_index(h, n, items_N):
    return h, query_tile(items_N[n]), 0

  def rows_index(h, n, items_N):
    return h, query_tile(items_N[n]), 0, 0

  def key_index(h, n, items_N):
    return 0 if key_heads == 1 else h, tpu_tiles.row_of(items_N[n]), 0

  def d_key_index(h, n, items_N):
    return h, tpu_tiles.row_of(items_N[n]), 0

  def d_query_index(h, n, items_N):
    return h, batch_of(items_N[n]), 0

  def slots_index(h, n, items_N):
    del h
    return query_tile(items_N[n]), 0, 0

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


def _kernel(
  items_N,
  query_HTQ,
  key_GSQ,
  value_GSV,
  d_out_HTV,
  rows_HDT,
  hiding,
  d_query_HTQ,
  d_key_GSQ,
  d_value_GSV,
  key_sum_GSQ,
  value_sum_GSV,
  *,
  sizes,
  scale,
  packed,
):
  """Works on one item for the heads of a step."""
  item = items_N[pl.program_id(1)]
  kind = tpu_tiles.kind_of(item)
  tile = lax.rem(tpu_tiles.row_of(item), sizes.key_tiles)
  first = tpu_tiles.is_first(item)

  @pl.when(first & (tile == 0))
  def _():
    d_query_HTQ[...] = jnp.zeros(d_query_HTQ.shape, jnp.float32)

  @pl.when(first)
  def _():
    key_sum_GSQ[...] = jnp.zeros(key_sum_GSQ.shape, jnp.float32)
    value_sum_GSV[...] = jnp.zeros(value_sum_GSV.shape, jnp.float32)

  def add_item(hide):
    start = tpu_tiles.column_of(item) * sizes.queries
    at = pl.ds(pl.multiple_of(start, sizes.queries), sizes.queries)
    for head in range(sizes.heads):
      key_head = 0 if key_GSQ.shape[0] == 1 else head
      d_query_TQ, d_key_SQ, d_value_SV = _gradients(
        query_HTQ[head],
        key_GSQ[key_head],
        value_GSV[key_head],
        d_out_HTV[head],
        rows_HDT[head],
        scale * tpu.LOG2_E,
        hide,
      )
      d_query_HTQ[head, at, :] += d_query_TQ
      key_sum_GSQ[key_head] += d_key_SQ
      value_sum_GSV[key_head] += d_value_SV

  @pl.when(kind == tpu_tiles.WHOLE)
  def _():
    add_item(lambda score_ST: score_ST)

  @pl.when(kind == tpu_tiles.PARTIAL)
  def _():
    add_item(lambda score_ST: _hide(sizes, tile, hiding[...], packed, score_ST))

  @pl.when(tpu_tiles.is_last(item))
  def _():
    d_key_GSQ[...] = (key_sum_GSQ[...] * scale).astype(d_key_GSQ.dtype)
    d_value_GSV[...] = value_sum_GSV[...].astype(d_value_GSV.dtype)


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
