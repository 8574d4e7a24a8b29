"""Masked attention on TPU, forward: tiles of queries by keys, online softmax.

The grid is (blocks of heads, items of work). An item is one tile of queries
with one tile of keys that it needs (see `tpu_tiles`); items of one query tile
follow one another. For each head of the block: scores = q k^T on the MXU,
masked if the item is partial, the running maximum, the sum and the output
rescaled and added to in VMEM; after a query tile's last item the output is
divided by the sum. The scores of the next head are computed before the softmax
of a head, so that the MXU works while the other units do. Exponentials are
powers of two, log2(e) goes into the scale. Sums stay apart by lane until the
end, so an item has one reduction across lanes, the maximum.

Memory of a step: the double-buffered blocks of query, key, value and output,
float32 scores of two heads and the weights of one, queries x keys each, and
float32 scratch of queries x (V + 256) a head. The pipeline loads the next
item's blocks during this item's products.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width. In a kernel T and S are a tile's queries and keys, H the
# heads of a step, J is 128 lanes, N items.

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.masked_attention import tpu_tiles

# Scores of hidden keys, and the start of the running maximum above them, so
# that exp(hidden - maximum) is 0 even where nothing is seen.
HIDDEN = -1e30
_FLOOR = -5e29
LOG2_E = math.log2(math.e)
LANES = tpu_tiles.LANES

# Largest tiles, and heads of a step.
QUERIES, KEYS, HEADS = 256, 1024, 4


def forward(
  query_BTHQ, key_BSGQ, value_BSGV, visible, scale, *, interpret=False
):
  """Returns (out_BTHV, lse_BTH); see the front for what they are."""
  queries, heads = query_BTHQ.shape[1:3]
  num_keys, key_heads = key_BSGQ.shape[1:3]
  sizes = tpu_tiles.choose_sizes(
    query_BTHQ.shape, num_keys, QUERIES, KEYS, HEADS
  )
  slots_BT = tpu_tiles.padded_slots(sizes, visible[0], num_keys)
  words_BTUJ = tpu_tiles.span_words(
    sizes, slots_BT, num_keys, visible, interpret
  )
  work = tpu_tiles.list_work(tpu_tiles.kinds(sizes, slots_BT, words_BTUJ))
  if words_BTUJ is None:
    hiding = jnp.broadcast_to(slots_BT.reshape(-1, 1), (slots_BT.size, LANES))
  else:
    hiding = words_BTUJ.reshape(slots_BT.size, -1)
  out_HTV, lse_HTJ = pl.pallas_call(
    functools.partial(
      _kernel,
      sizes=sizes,
      scale=scale * LOG2_E,
      packed=words_BTUJ is not None,
    ),
    grid_spec=_grid_spec(
      sizes,
      work,
      heads,
      key_heads,
      query_BTHQ.shape[3],
      value_BSGV.shape[3],
      packed=words_BTUJ is not None,
    ),
    out_shape=(
      jax.ShapeDtypeStruct(
        (heads, slots_BT.size, value_BSGV.shape[3]), value_BSGV.dtype
      ),
      jax.ShapeDtypeStruct((heads, slots_BT.size, LANES), jnp.float32),
    ),
    compiler_params=compiler_params(),
    cost_estimate=tpu_tiles.cost(
      sizes, heads, (query_BTHQ.shape[3], value_BSGV.shape[3])
    ),
    interpret=interpret,
    name="masked_attention_forward",
  )(
    work.items_N,
    tpu_tiles.head_major(query_BTHQ, sizes.query_tiles, sizes.queries),
    tpu_tiles.head_major(key_BSGQ, sizes.key_tiles, sizes.keys),
    tpu_tiles.head_major(value_BSGV, sizes.key_tiles, sizes.keys),
    hiding,
  )
  out_BTHV = tpu_tiles.batch_major(out_HTV, sizes.batch, queries)
  lse_BTH1 = tpu_tiles.batch_major(lse_HTJ[..., :1], sizes.batch, queries)
  return out_BTHV, lse_BTH1[..., 0]


def compiler_params():
  """Returns the parameters of both kernels: items go in order."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"),
    vmem_limit_bytes=56 * 2**20,
  )


def _grid_spec(sizes, work, heads, key_heads, width, value_width, *, packed):
  """Returns the grid (head blocks, items), its blocks and its scratch."""
  tile_queries, tile_keys = sizes.queries, sizes.keys
  block_key_heads = 1 if key_heads == 1 else sizes.heads

  def query_index(h, n, items_N):
    return h, tpu_tiles.row_of(items_N[n]), 0

  def key_index(h, n, items_N):
    batch = lax.div(tpu_tiles.row_of(items_N[n]), sizes.query_tiles)
    tile = batch * sizes.key_tiles + tpu_tiles.column_of(items_N[n])
    return 0 if key_heads == 1 else h, tile, 0

  def hiding_index(h, n, items_N):
    del h
    span = lax.div(tpu_tiles.column_of(items_N[n]), sizes.span_tiles)
    return tpu_tiles.row_of(items_N[n]), span if packed else 0

  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(heads // sizes.heads, work.count),
    in_specs=[
      pl.BlockSpec((sizes.heads, tile_queries, width), query_index),
      pl.BlockSpec((block_key_heads, tile_keys, width), key_index),
      pl.BlockSpec((block_key_heads, tile_keys, value_width), key_index),
      pl.BlockSpec((tile_queries, LANES), hiding_index),
    ],
    out_specs=[
      pl.BlockSpec((sizes.heads, tile_queries, value_width), query_index),
      pl.BlockSpec((sizes.heads, tile_queries, LANES), query_index),
    ],
    scratch_shapes=[
      pltpu.VMEM((sizes.heads, tile_queries, LANES), jnp.float32),
      pltpu.VMEM((sizes.heads, tile_queries, LANES), jnp.float32),
      pltpu.VMEM((sizes.heads, tile_queries, value_width), jnp.float32),
    ],
  )


class _Refs(NamedTuple):
  """Blocks and scratch of a step; top, sum and total are running values."""

  query_HTQ: jax.Array
  key_GSQ: jax.Array
  value_GSV: jax.Array
  hiding_TJ: jax.Array
  out_HTV: jax.Array
  lse_HTJ: jax.Array
  top_HTJ: jax.Array
  sum_HTJ: jax.Array
  total_HTV: jax.Array


def _kernel(items_N, *blocks, sizes, scale, packed):
  """Works on one item for the heads of a step."""
  refs = _Refs(*blocks)
  item = items_N[pl.program_id(1)]
  kind = tpu_tiles.kind_of(item)

  @pl.when(tpu_tiles.is_first(item))
  def _():
    refs.top_HTJ[...] = jnp.full(refs.top_HTJ.shape, _FLOOR, jnp.float32)
    refs.sum_HTJ[...] = jnp.zeros(refs.sum_HTJ.shape, jnp.float32)
    refs.total_HTV[...] = jnp.zeros(refs.total_HTV.shape, jnp.float32)

  @pl.when(kind == tpu_tiles.WHOLE)
  def _():
    _add_item(refs, scale, lambda scores: scores)

  @pl.when(kind == tpu_tiles.PARTIAL)
  def _():
    seen = _seen(sizes, item, refs.hiding_TJ[...], packed)
    _add_item(
      refs,
      scale,
      lambda scores: [
        jnp.where(seen(n), score_TJ, HIDDEN)
        for n, score_TJ in enumerate(scores)
      ],
    )

  @pl.when(tpu_tiles.is_last(item))
  def _():
    for head in range(sizes.heads):
      _finish_head(refs, head)


def _add_item(refs, scale, hide):
  """Adds a tile to the running values of all heads of a step.

  A head's scores come before the softmax of the head before it, so that
  products and elementwise work are scheduled together.
  """
  heads = refs.query_HTQ.shape[0]
  shared = refs.key_GSQ.shape[0] == 1

  def scores_of(head):
    key_SQ = refs.key_GSQ[0 if shared else head]
    score_TS = dot(refs.query_HTQ[head], key_SQ, (1, 1)) * scale
    starts = range(0, score_TS.shape[1], LANES)
    return hide([score_TS[:, at : at + LANES] for at in starts])

  next_scores = scores_of(0)
  for head in range(heads):
    scores = next_scores
    if head + 1 < heads:
      next_scores = scores_of(head + 1)
    value_SV = refs.value_GSV[0 if shared else head]
    _add_head(refs, head, scores, value_SV)


def _seen(sizes, item, hiding, packed):
  """Returns seen(n), the bool [T,J] of the n-th 128 keys of an item's tile."""
  tile = tpu_tiles.column_of(item)
  if packed:
    start = lax.rem(tile, sizes.span_tiles) * (sizes.keys // LANES)
    return lambda n: hiding & (jnp.int32(1) << (start + n)) != 0
  # What is left of the slots past a group's start, compared with the lanes.
  lane_TJ = lax.broadcasted_iota(jnp.int32, hiding.shape, 1)
  room_TJ = hiding - lane_TJ
  return lambda n: room_TJ >= tile * sizes.keys + n * LANES


def _add_head(refs, head, scores, value_SV):
  """Adds a tile to one head's running maximum, sum and output."""
  highest_TJ = functools.reduce(jnp.maximum, scores)
  old_top_TJ = refs.top_HTJ[head]
  new_top_TJ = jnp.maximum(
    old_top_TJ, jnp.max(highest_TJ, axis=1, keepdims=True)
  )
  shrink_TJ = jnp.exp2(old_top_TJ - new_top_TJ)
  weights = [jnp.exp2(score_TJ - new_top_TJ) for score_TJ in scores]
  refs.top_HTJ[head] = new_top_TJ
  refs.sum_HTJ[head] = refs.sum_HTJ[head] * shrink_TJ + functools.reduce(
    jnp.add, weights
  )
  weight_TS = jnp.concatenate(weights, axis=1).astype(value_SV.dtype)
  added_TV = dot(weight_TS, value_SV, (1, 0))
  shrink_TV = across(shrink_TJ, value_SV.shape[1])
  refs.total_HTV[head] = refs.total_HTV[head] * shrink_TV + added_TV


def _finish_head(refs, head):
  """Writes the output and the log-sum-exp of one head."""
  sum_TJ = refs.sum_HTJ[head]
  sum_TJ = jnp.broadcast_to(
    jnp.sum(sum_TJ, axis=1, keepdims=True), sum_TJ.shape
  )
  # NaN scores must stay NaN: only an exact zero means that nothing was seen.
  empty_TJ = sum_TJ == 0.0
  safe_TJ = jnp.where(empty_TJ, 1.0, sum_TJ)
  lse_TJ = refs.top_HTJ[head] * (1.0 / LOG2_E) + jnp.log(safe_TJ)
  refs.lse_HTJ[head] = jnp.where(empty_TJ, -jnp.inf, lse_TJ)
  out_TV = refs.total_HTV[head] / across(safe_TJ, refs.out_HTV.shape[2])
  refs.out_HTV[head] = out_TV.astype(refs.out_HTV.dtype)


def dot(left, right, axes):
  """Multiplies two matrices along `axes`, float32 in full where they are."""
  dtype = jnp.promote_types(left.dtype, right.dtype)
  exact = dtype == jnp.float32
  return lax.dot_general(
    left.astype(dtype),
    right.astype(dtype),
    (((axes[0],), (axes[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def across(x_TJ, width):
  """Widens or narrows an array whose lanes are all equal to `width` lanes."""
  if width <= LANES:
    return x_TJ[:, :width]
  repeated = jnp.concatenate([x_TJ] * -(-width // LANES), axis=1)
  return repeated[:, :width]
