"""Index scores and exact selection in one TPU kernel; no score reaches HBM.

Keys lie along sublanes and queries along lanes, so that a threshold for each
query is one register and a count over keys needs no reduction across lanes. A
query tile has C = 128, 64 or 32 queries, the most whose scores fit a scratch of
`SCRATCH_BYTES`. With C < 128 the 128 lanes are L = (G, C) with G = 128 / C
groups: G heads are multiplied at once, one a group, their sums are added over
the groups, and group g then keeps the keys of every G-th block of 256.

Grid (batch, query tile, key tile), the key tiles in order:
- Every key tile up to the last visible one: blocks of 256 keys, for each two
  matrix products of 128 lanes at a time, ReLU, weights and head sum in float32.
  The score is stored as an int32 that sorts like the float (`order.encode`), a
  key that a query may not see as the least int32. The running number of
  visible keys, their least and greatest score are kept. Tiles past the last
  visible one are neither computed nor fetched.
- At the last key tile: `tpu_search` finds each query's threshold and writes the
  mask and the two log-sum-exps.
The 256 keys of a block are stored as (bit, word): key 32 * word + bit in row
8 * bit + word. XLA brings the keys into this order first, so that a packed word
is an OR of whole registers, and puts the words into their place at the end.

VMEM: the scores, 4 * C bytes a key (16 MiB for 32K keys, 32 MiB for 64K and
128K), and twice the blocks of a step: C queries of all heads (2 MiB in bfloat16
for C = 128 and 64 heads), 1024 * G keys, the words of the mask (C / 8 bytes a
key).
"""
# B batch, T queries, S keys, I index heads, K index width, C queries of a tile,
# G lane groups, L lanes (G, C), Q query tiles, J head groups, P padded keys,
# R rows of 128 keys, Z rows of a block, W words of 32 keys, N selected keys

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import tiles
from pallas_kernels.index_select import order
from pallas_kernels.index_select import tpu_indices
from pallas_kernels.index_select import tpu_scores
from pallas_kernels.index_select import tpu_search

LANES = tpu_search.LANES
MIN_QUERIES = 32
# Most bytes of a query tile's scores.
SCRATCH_BYTES = 2**25
# Rows of the scores for each key tile.
TILE = 1024
BLOCK = tpu_search.BLOCK
# What the compiler may use beside the blocks and scratches.
SPARE_BYTES = 2**22


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
  interpret=False,
):
  """Returns the fields of `Selected` in order; see the front."""
  num_queries, num_keys = query_BTIK.shape[1], key_BSK.shape[1]
  slots_BT = jnp.minimum(slots_BT, num_keys - 1)
  sizes = _sizes(query_BTIK, key_BSK, top_k)
  words_BQWL, stats_BQ8L = _call(
    sizes,
    interpret,
    _query_blocks(sizes, query_BTIK, weight_BTI, slots_BT, query_segments_BT),
    _key_blocks(sizes, key_BSK, key_segments_BS, key_scale_BS),
  )
  mask_BTW = indices_BTN = None
  if want_mask or want_indices:
    mask_BTW = _mask(sizes, words_BQWL)[:, :num_queries]
    mask_BTW = mask_BTW[..., : bitmask.num_words(num_keys)]
  if want_indices:
    indices_BTN = tpu_indices.to_indices(mask_BTW, top_k, interpret=interpret)
  stats_BQ8C = stats_BQ8L[..., : sizes.queries]
  stats_8BT = jnp.moveaxis(stats_BQ8C, 2, 0).reshape(8, len(slots_BT), -1)
  lse_all_BT, lse_selected_BT, invalid_BT = stats_8BT[:3, :, :num_queries]
  return (
    mask_BTW if want_mask else None,
    indices_BTN,
    lse_all_BT,
    lse_selected_BT,
    invalid_BT > 0,
  )


def _sizes(query_BTIK, key_BSK, top_k):
  _, num_queries, heads, width = query_BTIK.shape
  num_keys = key_BSK.shape[1]
  queries = LANES
  while queries > MIN_QUERIES and (
    4 * queries * num_keys > SCRATCH_BYTES or queries // 2 >= num_queries
  ):
    queries //= 2
  if 4 * queries * num_keys > SCRATCH_BYTES:
    raise ValueError(f"{num_keys=} do not fit the memory of this kernel")
  # Products of bfloat16 are exact in float32, and float8 is within bfloat16.
  narrow = all(
    x.dtype in (jnp.bfloat16, jnp.float8_e4m3fn) for x in (query_BTIK, key_BSK)
  )
  rows = -(-num_keys * queries // LANES)
  return tpu_scores.Sizes(
    queries=queries,
    tile=min(TILE, -(-rows // BLOCK) * BLOCK),
    heads=heads,
    width=-(-width // LANES) * LANES,
    top_k=top_k,
    dtype=jnp.dtype(jnp.bfloat16 if narrow else jnp.float32),
  )


def _query_blocks(sizes, query_BTIK, weight_BTI, slots_BT, segments_BT):
  """Returns queries [B,T,I*K] and rows of lanes: weights, slots, segments."""
  batch, num_queries = slots_BT.shape
  padded = -(-num_queries // sizes.queries) * sizes.queries
  width = query_BTIK.shape[-1]
  padding = [(0, 0)] * 3 + [(0, sizes.width - width)]
  query_BTX = jnp.pad(query_BTIK, padding).reshape(batch, num_queries, -1)
  query_BTX = tiles.pad(query_BTX, padded)
  head_groups = -(-sizes.heads // sizes.groups)
  extra_heads = head_groups * sizes.groups - sizes.heads
  weight_BTI = jnp.pad(
    weight_BTI.astype(jnp.float32), [(0, 0), (0, 0), (0, extra_heads)]
  )
  weight_BQCJG = tiles.pad(weight_BTI, padded).reshape(
    batch, -1, sizes.queries, head_groups, sizes.groups
  )
  weight_BQJL = jnp.transpose(weight_BQCJG, (0, 1, 3, 4, 2)).reshape(
    batch, -1, head_groups, LANES
  )

  def lanes(x_BT):
    x_BQC = tiles.pad(x_BT, padded).reshape(batch, -1, sizes.queries)
    return jnp.tile(x_BQC[:, :, None], (1, 1, 1, sizes.groups))

  slots_BQ1L = lanes(slots_BT + 1) - 1
  segments_BQ1L = None if segments_BT is None else lanes(segments_BT)
  return query_BTX, weight_BQJL, slots_BQ1L, segments_BQ1L


def _key_blocks(sizes, key_BSK, segments_BS, scale_BS):
  """Returns keys, segments and scales, each block of 256 as (bit, word)."""
  unit = sizes.tile * sizes.groups
  padded = -(-key_BSK.shape[1] // unit) * unit

  def reorder(x_BS):
    x_BS = tiles.pad(x_BS, padded)
    words = BLOCK // bitmask.BITS
    shape = (len(x_BS), -1, words, bitmask.BITS, *x_BS.shape[2:])
    return jnp.swapaxes(x_BS.reshape(shape), 2, 3)

  batch, _, width = key_BSK.shape
  key_BPK = reorder(key_BSK).reshape(batch, padded, width)
  key_BPK = jnp.pad(key_BPK, [(0, 0), (0, 0), (0, sizes.width - width)])
  segments_BRL = scale_BRL = None
  if segments_BS is not None:
    segments_BRL = reorder(segments_BS).reshape(batch, -1, LANES)
  if scale_BS is not None:
    scale_BRL = reorder(scale_BS).reshape(batch, -1, LANES)
  return key_BPK, segments_BRL, scale_BRL


def _mask(sizes, words_BQWL):
  """Brings words (block, word of 8; group, query) to [B,T,W], uint32."""
  batch, num_tiles, rows, _ = words_BQWL.shape
  shape = (batch, num_tiles, rows // 8, 8, sizes.groups, sizes.queries)
  words = jnp.transpose(words_BQWL.reshape(shape), (0, 1, 5, 2, 4, 3))
  words_BTW = words.reshape(batch, num_tiles * sizes.queries, -1)
  return lax.bitcast_convert_type(words_BTW, jnp.uint32)


def _call(sizes, interpret, query_blocks, key_blocks):
  """Returns words int32 [B,Q,W,L] and statistics float32 [B,Q,8,L]."""
  query_BTX, weight_BQJL, slots_BQ1L, query_segments_BQ1L = query_blocks
  key_BPK, key_segments_BRL, scale_BRL = key_blocks
  batch, num_tiles, head_groups, _ = weight_BQJL.shape
  unit = sizes.tile * sizes.groups
  rows = key_BPK.shape[1] // sizes.groups
  # Blocks of all groups up to the last visible key of each query tile.
  seen_BQ = jnp.max(slots_BQ1L, axis=(2, 3)) // (BLOCK * sizes.groups) + 1

  def by_query(*shape):
    return pl.BlockSpec((1, 1, *shape), lambda b, q, p, _: (b, q, 0, 0))

  def by_key(*shape):
    def index(b, q, p, seen_ref):
      last = lax.div(jnp.maximum(seen_ref[b, q] - 1, 0), sizes.tile // BLOCK)
      return b, jnp.minimum(p, last), 0

    return pl.BlockSpec((1, *shape), index)

  query_spec = pl.BlockSpec(
    (1, sizes.queries, query_BTX.shape[-1]), lambda b, q, p, _: (b, q, 0)
  )
  inputs = [
    (query_BTX, query_spec),
    (weight_BQJL, by_query(head_groups, LANES)),
    (slots_BQ1L, by_query(1, LANES)),
    (query_segments_BQ1L, by_query(1, LANES)),
    (key_BPK, by_key(unit, sizes.width)),
    (key_segments_BRL, by_key(unit // LANES, LANES)),
    (scale_BRL, by_key(unit // LANES, LANES)),
  ]
  given = [x is not None for x, _ in inputs]
  inputs = [pair for pair in inputs if pair[0] is not None]
  words = rows // bitmask.BITS
  block_bytes = sum(
    x.dtype.itemsize * _size(spec.block_shape) for x, spec in inputs
  )
  block_bytes += 4 * LANES * (words + 8)
  return pl.pallas_call(
    functools.partial(_kernel, sizes, given),
    out_shape=(
      jax.ShapeDtypeStruct((batch, num_tiles, words, LANES), jnp.int32),
      jax.ShapeDtypeStruct((batch, num_tiles, 8, LANES), jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch, num_tiles, rows // sizes.tile),
      in_specs=[spec for _, spec in inputs],
      out_specs=(by_query(words, LANES), by_query(8, LANES)),
      scratch_shapes=[
        pltpu.VMEM((rows, LANES), jnp.int32),
        pltpu.VMEM((3, 8, LANES), jnp.int32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=4 * LANES * rows + 2 * block_bytes + SPARE_BYTES,
    ),
    cost_estimate=_cost(sizes, batch * num_tiles, inputs, rows),
    interpret=interpret,
    name="index_select",
  )(seen_BQ, *(x for x, _ in inputs))


def _cost(sizes, num_tiles, inputs, rows):
  """Estimates a kernel that sees every key; up to which it does, data tell."""
  pairs = num_tiles * sizes.queries * rows * sizes.groups
  return pl.CostEstimate(
    flops=2 * pairs * sizes.heads * sizes.width,
    transcendentals=2 * pairs,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x, _ in inputs)
    + pairs // 8,
  )


def _size(shape):
  return functools.reduce(lambda x, y: x * y, shape, 1)


def _kernel(sizes, given, seen_ref, *refs):
  """One key tile of one query tile."""
  refs = iter(refs)
  inputs = tpu_scores.Inputs(*(next(refs) if x else None for x in given))
  words_ref, stats_ref, ordered_ref, seen_stats_ref = refs
  tile = pl.program_id(2)
  per_tile = sizes.tile // BLOCK
  seen = seen_ref[pl.program_id(0), pl.program_id(1)]

  @pl.when(tile == 0)
  def _():
    seen_stats_ref[...] = jnp.stack(
      [jnp.full((8, LANES), x, jnp.int32) for x in tpu_search.EMPTY_STATISTICS]
    )

  @pl.when(tile * per_tile < seen)
  def _():
    def body(block, _):
      ordered_ZL = jnp.full((BLOCK, LANES), order.HIDDEN, jnp.int32)
      ordered_ref[tpu_search.rows(tile * per_tile + block), :] = ordered_ZL

    own = jnp.minimum(seen - tile * per_tile, per_tile)
    lax.fori_loop(own, per_tile, body, None)

    def scores(block, _):
      at = tile * per_tile + block
      ordered_ZL = tpu_scores.codes(sizes, inputs, block, at)
      ordered_ref[tpu_search.rows(at), :] = ordered_ZL
      seen_stats_ref[...] = tpu_search.add_statistics(
        seen_stats_ref[...], ordered_ZL
      )

    lax.fori_loop(0, own, scores, None)

  @pl.when(tile == pl.num_programs(2) - 1)
  def _():
    tpu_search.finish(
      sizes, seen, ordered_ref, seen_stats_ref, words_ref, stats_ref
    )
