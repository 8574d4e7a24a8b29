"""Masked attention on TPU, forward: tiles of queries by keys, online softmax.

The grid is (blocks of heads, items of work). An item is one tile of queries
with one tile of keys that it needs (see `tpu_tiles`); items of one query tile
follow one another. For each head of the block: scores = q k^T on the MXU,
masked if the item is partial, the running maximum, the sum and the output
rescaled and added to in VMEM; after a query tile's last item the output is
divided by the sum. Exponentials are powers of two, log2(e) goes into the scale.
Sums stay apart by lane until the end, so an item has one reduction across
lanes, the maximum.

Memory of a step: the double-buffered blocks of query, key, value and output,
the scores and weights of a tile (2 x 4 bytes x queries x keys a head), and
float32 scratch of queries x (V + 256) a head. The pipeline loads the next
item's blocks during this item's products.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width. In a kernel T and S are a tile's queries and keys, H the
# heads of a step, J is 128 lanes, N items.

import functools
import math

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
_QUERIES, _KEYS, _HEADS = 256, 1024, 2


def forward(
  query_BTHQ, key_BSGQ, value_BSGV, visible, scale, *, interpret=False
):
  """Returns (out_BTHV, lse_BTH); see the front for what they are."""
  queries, heads = query_BTHQ.shape[1:3]
  num_keys, key_heads = key_BSGQ.shape[1:3]
  sizes = tpu_tiles.choose_sizes(
    query_BTHQ.shape, num_keys, _QUERIES, _KEYS, _HEADS
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


def _kernel(
  items_N,
  query_HTQ,
  key_GSQ,
  value_GSV,
  hiding_TJ,
  out_HTV,
  lse_HTJ,
  top_HTJ,
  sum_HTJ,
  total_HTV,
  *,
  sizes,
  scale,
  packed,
):
  """Works on one item for the heads of a step."""
  item = items_N[pl.program_id(1)]
  kind = tpu_tiles.kind_of(item)

  @pl.when(tpu_tiles.is_first(item))
  def _():
    top_HTJ[...] = jnp.full(top_HTJ.shape, _FLOOR, jnp.float32)
    sum_HTJ[...] = jnp.zeros(sum_HTJ.shape, jnp.float32)
    total_HTV[...] = jnp.zeros(total_HTV.shape, jnp.float32)

  def add_item(hide):
    for head in range(sizes.heads):
      key_head = 0 if key_GSQ.shape[0] == 1 else head
      score_TS = dot(query_HTQ[head], key_GSQ[key_head], (1, 1)) * scale
      scores = hide(
        [
          score_TS[:, start : start + LANES]
          for start in range(0, sizes.keys, LANES)
        ]
      )
      _add_head(
        scores,
        value_GSV[key_head],
        top_HTJ.at[head],
        sum_HTJ.at[head],
        total_HTV.at[head],
      )

  @pl.when(kind == tpu_tiles.WHOLE)
  def _():
    add_item(lambda scores: scores)

  @pl.when(kind == tpu_tiles.PARTIAL)
  def _():
    seen = _seen(sizes, item, hiding_TJ, packed)
    add_item(
      lambda scores: [
        jnp.where(seen(n), score_TJ, HIDDEN)
        for n, score_TJ in enumerate(scores)
      ]
    )

  @pl.when(tpu_tiles.is_last(item))
  def _():
    for head in range(sizes.heads):
      _finish_head(
        out_HTV.at[head],
        lse_HTJ.at[head],
        top_HTJ[head],
        sum_HTJ[head],
        total_HTV[head],
      )


def _seen(sizes, item, hiding_TJ, packed):
  """Returns seen(n), the bool [T,J] of the n-th 128 keys of an item's tile."""
  tile = tpu_tiles.column_of(item)
  hiding = hiding_TJ[...]
  if packed:
    start = lax.rem(tile, sizes.span_tiles) * (sizes.keys // LANES)
    return lambda n: hiding & (jnp.int32(1) << (start + n)) != 0
  # What is left of the slots past a group's start, compared with the lanes.
  lane_TJ = lax.broadcasted_iota(jnp.int32, hiding.shape, 1)
  room_TJ = hiding - lane_TJ
  return lambda n: room_TJ >= tile * sizes.keys + n * LANES


def _add_head(scores, value_SV, top_TJ, sum_TJ, total_TV):
  """Adds a tile to one head's running maximum, sum and output."""
  highest_TJ = functools.reduce(jnp.maximum, scores)
  old_top_TJ = top_TJ[...]
  new_top_TJ = jnp.maximum(
    old_top_TJ, jnp.max(highest_TJ, axis=1, keepdims=True)
  )
  shrink_TJ = jnp.exp2(old_top_TJ - new_top_TJ)
  weights = [jnp.exp2(score_TJ - new_top_TJ) for score_TJ in scores]
  top_TJ[...] = new_top_TJ
  sum_TJ[...] = sum_TJ[...] * shrink_TJ + functools.reduce(jnp.add, weights)
  weight_TS = jnp.concatenate(weights, axis=1).astype(value_SV.dtype)
  added_TV = dot(weight_TS, value_SV, (1, 0))
  width = value_SV.shape[1]
  total_TV[...] = total_TV[...] * across(shrink_TJ, width) + added_TV


def _finish_head(out_TV, lse_TJ, top_TJ, sum_TJ, total_TV):
  """Writes the output and the log-sum-exp of one head."""
  sum_TJ = jnp.broadcast_to(
    jnp.sum(sum_TJ, axis=1, keepdims=True), sum_TJ.shape
  )
  # NaN scores must stay NaN: only an exact zero means that nothing was seen.
  empty_TJ = sum_TJ == 0.0
  safe_TJ = jnp.where(empty_TJ, 1.0, sum_TJ)
  lse_TJ[...] = jnp.where(
    empty_TJ, -jnp.inf, top_TJ * (1.0 / LOG2_E) + jnp.log(safe_TJ)
  )
  width = out_TV.shape[1]
  out_TV[...] = (total_TV / across(safe_TJ, width)).astype(out_TV.dtype)


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
