"""Index scores on Hopper tensor cores, then exact selection.

Scores of a chunk of queries [C,P] go to memory; XLA hides and orders them,
`gpu_search` finds what is selected, and XLA makes the outputs of it.
Tiles: a block takes the 64 heads of two queries, 128 rows [2*I,K], which stay
in shared memory, and walks over the keys in tiles of 256 up to the last key
that either query may see: later tiles are skipped and stay unwritten.
Pipeline: five warpgroups. One fetches key tiles by TMA into a ring; each of the
others multiplies 64 keys of a tile with a query's heads, as keys x heads, so
that ReLU, weights and the sum over heads (in the rows of a warp's registers)
need no other warp, and writes 64 scores of the query straight to memory.
bfloat16 products of bfloat16 inputs, float8 of float8 ones; sums are float32.
Memory a step, in shared memory: queries 32 KB and 3 tiles of 64 KB in bfloat16,
half of it in float8; in global memory [C,P] float32 and int32.
"""
# B batch, T queries, S keys, I index heads, K index width, C queries of a
# chunk, P padded keys, X heads of all queries of a chunk, G groups of queries

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import gpu_tiles
from pallas_kernels import tiles
from pallas_kernels.index_select import gpu_search
from pallas_kernels.index_select import order

# Heads and width of the index queries, filled up with zeros.
HEADS, WIDTH = 64, 128
# Queries of a block, keys of a tile, and keys of a warpgroup's part of it.
GROUP, TILE, PART = 2, 256, 64
STAGES = 3
FETCHER = TILE // PART
REGISTERS = gpu_tiles.register_shares(*[112] * FETCHER, 32)
# Most bytes of a chunk's scores, and bounds of its queries.
CHUNK_BYTES = 2**28
MIN_CHUNK, MAX_CHUNK = 64, 4096


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
  interpret=False,
):
  """Returns the fields of `Selected` in order; see the front.

  Raises:
    ValueError: heads or width that do not fit, or a dtype other than bfloat16
      or float8_e4m3fn of both queries and keys.
  """
  _check(query_BTIK, key_BSK)
  num_queries, num_keys = query_BTIK.shape[1], key_BSK.shape[1]
  padded_keys = -(-num_keys // TILE) * TILE
  chunk = min(max(CHUNK_BYTES // (4 * padded_keys), MIN_CHUNK), MAX_CHUNK)
  chunk = min(chunk, num_queries)
  chunk = -(-chunk // GROUP) * GROUP
  padded_queries = -(-num_queries // chunk) * chunk
  queries = (
    _fill(query_BTIK, (padded_queries, HEADS, WIDTH)),
    _fill(weight_BTI.astype(jnp.float32), (padded_queries, HEADS)),
    tiles.pad(jnp.minimum(slots_BT, num_keys - 1), padded_queries, -1),
    tiles.pad(query_segments_BT, padded_queries),
  )
  keys = (
    _fill(key_BSK, (padded_keys, WIDTH)),
    tiles.pad(key_segments_BS, padded_keys),
    tiles.pad(key_scale_BS, padded_keys),
  )
  wanted = _Wanted(top_k, num_keys, want_mask, want_indices)
  step = functools.partial(_chunk, wanted, interpret)

  def row(arrays):
    queries, keys = arrays
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), queries)
    outputs = lax.map(lambda own: step(own, keys), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

  outputs = lax.map(row, (queries, keys))
  return jax.tree.map(lambda x: x[:, :num_queries], outputs)


def scores(query_CIK, key_PK, weight_CI, last_C, *, interpret=False):
  """Returns float32 [C,P] scores of the keys up to each query's last.

  Args:
    query_CIK: C a multiple of 2, with 64 heads of width 128.
    key_PK: P a multiple of 256.
    weight_CI: float32 weights.
    last_C: int32 last key that each query sees, or -1.
    interpret: what to give `plgpu.kernel` as `interpret`.

  Scores of tiles of 256 keys past the last of both queries of a pair are
  unset; others past the last are set, and not to be used.
  """
  chunk, padded_keys = query_CIK.shape[0], key_PK.shape[0]
  tiles_G = jnp.max(last_C.reshape(-1, GROUP), axis=1) // TILE + 1
  columns = 128 // key_PK.dtype.itemsize
  transforms = (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(128),
  )
  kernel = plgpu.kernel(
    _scores_kernel,
    out_type=jax.ShapeDtypeStruct((chunk, padded_keys), jnp.float32),
    grid=(chunk // GROUP,),
    grid_names=("group",),
    num_threads=FETCHER + 1,
    thread_name="part",
    scratch_types=dict(
      query=plgpu.SMEM(
        (GROUP * HEADS, WIDTH), key_PK.dtype, transforms=transforms
      ),
      ring=plgpu.SMEM(
        (STAGES, TILE, WIDTH), key_PK.dtype, transforms=transforms
      ),
      query_here=plgpu.Barrier(),
      full=plgpu.Barrier(num_barriers=STAGES),
      empty=plgpu.Barrier(num_arrivals=FETCHER, num_barriers=STAGES),
    ),
    # Safe, and four waits a tile less: no thread reads what a thread writes.
    compiler_params=gpu_tiles.parameters().replace(
      unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
    kernel_name="index_scores",
  )
  query_XK = query_CIK.reshape(-1, WIDTH)
  return kernel(tiles_G, query_XK, key_PK, weight_CI.reshape(-1))


def _scores_kernel(
  tiles_G,
  query_XK,
  key_PK,
  weight_X,
  score_CP,
  *,
  query,
  ring,
  query_here,
  full,
  empty,
):
  """Scores one pair of queries against all its key tiles."""
  group, part = lax.axis_index("group"), lax.axis_index("part")
  first = group * GROUP
  num_tiles = tiles_G[group]

  @pl.when(part == FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[FETCHER], action="decrease")
    rows = pl.ds(first * HEADS, GROUP * HEADS)
    plgpu.copy_gmem_to_smem(query_XK.at[rows], query, query_here)

    @pl.loop(0, num_tiles)
    def _(tile):
      stage = lax.rem(tile, STAGES)

      @pl.when(tile >= STAGES)
      def _():
        plgpu.barrier_wait(empty.at[stage])

      keys = pl.ds(tile * TILE, TILE)
      plgpu.copy_gmem_to_smem(key_PK.at[keys], ring.at[stage], full.at[stage])

    gpu_tiles.await_last(num_tiles, STAGES, empty)

  @pl.when(part < FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    plgpu.barrier_wait(query_here)
    weights = [
      gpu_tiles.load_columns(weight_X.at[pl.ds((first + i) * HEADS, HEADS)])
      for i in range(GROUP)
    ]

    @pl.loop(0, num_tiles)
    def _(tile):
      stage = lax.rem(tile, STAGES)
      plgpu.barrier_wait(full.at[stage])
      keys = ring.at[stage, pl.ds(part * PART, PART)]
      products = _products(query, keys)
      plgpu.barrier_arrive(empty.at[stage])
      columns = pl.ds(tile * TILE + part * PART, PART)
      for i in range(GROUP):
        weight = gpu_tiles.along_rows(weights[i])
        terms = jnp.maximum(products[i], 0.0) * weight
        score_CP[first + i, columns] = jnp.sum(terms, axis=1)


def _products(query, keys):
  """Multiplies 64 keys with the heads of each query, float32 [64,64]."""

  def multiply(*accumulators):
    for i, accumulator in enumerate(accumulators):
      own = query.at[pl.ds(i * HEADS, HEADS)]
      plgpu.wgmma(accumulator, keys, own.transpose((1, 0)))
    return tuple(accumulator[...] for accumulator in accumulators)

  accumulator = plgpu.ACC((PART, HEADS), jnp.float32)
  return pl.run_scoped(multiply, *[accumulator] * GROUP)


def _chunk(wanted, interpret, queries, keys):
  """Scores one chunk of queries and selects; the fields of `Selected`."""
  query_CIK, weight_CI, slots_C, segments_C = queries
  key_PK, segments_P, scale_P = keys
  score_CP = scores(query_CIK, key_PK, weight_CI, slots_C, interpret=interpret)
  if scale_P is not None:
    score_CP = score_CP * scale_P
  allowed_CP = jnp.arange(key_PK.shape[0]) <= slots_C[:, None]
  if segments_C is not None:
    allowed_CP &= segments_C[:, None] == segments_P
  # This also hides what was not written.
  ordered_CP = jnp.where(allowed_CP, order.encode(score_CP), order.HIDDEN)
  cut = gpu_search.best(ordered_CP, wanted.top_k, interpret=interpret)
  return _outputs(ordered_CP, cut, wanted)


def _outputs(ordered_CP, cut, wanted):
  """Returns the fields of `Selected` for one chunk."""
  index_P = jnp.arange(ordered_CP.shape[1], dtype=jnp.int32)
  selected_CP = cut.holds(ordered_CP, index_P)
  seen_CP = (ordered_CP > order.HIDDEN) & ~cut.invalid_C[:, None]
  mask_CW = indices_CN = None
  if wanted.mask or wanted.indices:
    mask_CW = bitmask.pack(selected_CP[:, : wanted.num_keys])
  if wanted.indices:
    indices_CN = bitmask.to_indices(mask_CW, wanted.top_k, wanted.num_keys)
  score_CP = order.decode(ordered_CP)
  return (
    mask_CW if wanted.mask else None,
    indices_CN,
    _log_sum_exp(score_CP, seen_CP),
    _log_sum_exp(score_CP, selected_CP),
    cut.invalid_C,
  )


def _log_sum_exp(score_CP, where_CP):
  return jax.nn.logsumexp(jnp.where(where_CP, score_CP, -jnp.inf), axis=1)


def _fill(array_BX, sizes):
  """Fills up the axes after the first with zeros."""
  missing = [size - own for size, own in zip(sizes, array_BX.shape[1:])]
  return jnp.pad(array_BX, [(0, 0)] + [(0, n) for n in missing])


def _check(query_BTIK, key_BSK):
  heads, width = query_BTIK.shape[2:]
  if heads > HEADS or width > WIDTH:
    raise ValueError(f"{query_BTIK.shape=}: at most {HEADS=}, {WIDTH=}")
  if query_BTIK.dtype != key_BSK.dtype:
    raise ValueError(f"{query_BTIK.dtype=} differs from {key_BSK.dtype=}")
  if query_BTIK.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
    raise ValueError(f"{query_BTIK.dtype=} must be bfloat16 or float8_e4m3fn")
