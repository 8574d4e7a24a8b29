"""Flash attention under packed masks on Hopper tensor cores, forward.

XLA first folds causality, segments and selection into words of 32 keys, and
lists for each block of 128 queries the key tiles in which a query sees a key
(`gpu_lists`); the kernel walks over that list alone.
Tiles: 128 queries of one head; a tile has 128 keys, or 64 where wide heads
leave no room.
Pipeline: three warpgroups. The last fetches keys and values of the listed tiles
by TMA into a ring. Each of the others takes 64 queries: products, mask and
online softmax in registers, weights (bfloat16) straight from registers into the
product with the values.
Memory of a block, in shared memory: queries 48 KB and two tiles of 80 KB for
widths of 192 and 128; in global memory one bit for each query and key, and the
lists. Products are bfloat16, sums float32.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, W words of 32 keys, M blocks of queries, N key tiles,
# C queries of a warpgroup, Z keys of a tile

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import gpu_tiles
from pallas_kernels import tiles
from pallas_kernels.masked_attention import gpu_lists

# Queries of a warpgroup, and of a block; slots of the ring.
ROWS, BLOCK, SLOTS = gpu_tiles.ROWS, 128, 2
FETCHER = BLOCK // ROWS
REGISTERS = gpu_tiles.register_shares(*[232] * FETCHER, 40)
TILES = (128, 64)
# Widest head, and bytes of shared memory for queries and ring.
MAX_WIDTH, MAX_BYTES = gpu_tiles.MAX_COLUMNS, 225 * 1024


def forward(
  query_BTHQ, key_BSGQ, value_BSGV, visible, scale, *, interpret=False
):
  """Returns (out_BTHV, lse_BTH); see the front for what they are.

  Raises:
    ValueError: a dtype other than bfloat16, or a width that is no multiple of
      64 up to 256.
  """
  check(query_BTHQ, key_BSGQ, value_BSGV)
  num_queries, width = query_BTHQ.shape[1], query_BTHQ.shape[3]
  keys, value_width = value_BSGV.shape[1], value_BSGV.shape[3]
  tile = tile_size(width, value_width)
  padded_keys = -(-keys // tile) * tile
  words_BWT = gpu_lists.visible_words(*visible, keys)
  words_BWT = gpu_lists.pad_words(words_BWT, padded_keys, BLOCK)
  tiles_BMN, count_BM = gpu_lists.list_tiles(words_BWT, tile, BLOCK)
  out_BTHV, lse_BHT = _forward(
    tiles.pad(query_BTHQ, words_BWT.shape[2]),
    tiles.pad(key_BSGQ, padded_keys),
    tiles.pad(value_BSGV, padded_keys),
    words_BWT,
    tiles_BMN,
    count_BM,
    scale=scale,
    tile=tile,
    interpret=interpret,
  )
  lse_BTH = jnp.swapaxes(lse_BHT, 1, 2)
  return out_BTHV[:, :num_queries], lse_BTH[:, :num_queries]


def tile_size(width, value_width):
  """Returns how many keys a tile has."""
  for tile in TILES:
    ring = SLOTS * tile * (width + value_width)
    if 2 * (BLOCK * max(width, value_width) + ring) <= MAX_BYTES:
      return tile
  raise ValueError(f"{width=} and {value_width=} leave no room for a tile")


def _forward(
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  words_BWT,
  tiles_BMN,
  count_BM,
  *,
  scale,
  tile,
  interpret,
):
  """Runs the kernel; queries are a multiple of 128, keys of `tile`."""
  batch, queries, heads, width = query_BTHQ.shape
  value_width = value_BSGV.shape[3]
  smem = gpu_tiles.smem
  # The output leaves by the memory of the queries if they are wide enough.
  first = value_width if width >= value_width else width
  scratch = dict(
    query=smem(FETCHER, ROWS, first),
    keys=smem(SLOTS, tile, width),
    values=smem(SLOTS, tile, value_width),
    query_here=plgpu.Barrier(num_barriers=FETCHER, num_arrivals=1),
    key_full=plgpu.Barrier(num_barriers=SLOTS),
    value_full=plgpu.Barrier(num_barriers=SLOTS),
    key_empty=plgpu.Barrier(num_barriers=SLOTS, num_arrivals=FETCHER),
    value_empty=plgpu.Barrier(num_barriers=SLOTS, num_arrivals=FETCHER),
  )
  if width > first:
    scratch["query_rest"] = smem(FETCHER, ROWS, width - first)
    scratch["query_here"] = plgpu.Barrier(num_barriers=FETCHER, num_arrivals=2)
  if value_width > first:
    scratch["out"] = smem(FETCHER, ROWS, value_width)
  if interpret:
    scratch["weights"] = smem(FETCHER, ROWS, tile)
  kernel = plgpu.kernel(
    functools.partial(_kernel, scale * math.log2(math.e)),
    out_type=(
      jax.ShapeDtypeStruct((batch, queries, heads, value_width), jnp.bfloat16),
      jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ),
    grid=(batch, heads, queries // BLOCK),
    grid_names=("batch", "head", "block"),
    num_threads=FETCHER + 1,
    thread_name="role",
    scratch_types=scratch,
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    kernel_name="masked_attention_forward",
  )
  arrays = (query_BTHQ, key_BSGQ, value_BSGV, words_BWT, tiles_BMN, count_BM)
  return kernel(*arrays)


def _kernel(
  scale,
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  words_BWT,
  tiles_BMN,
  count_BM,
  out_BTHV,
  lse_BHT,
  **scratch,
):
  """Attends with 128 queries of one head; scale has log2(e) inside."""
  role = lax.axis_index("role")

  @pl.when(role == FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[FETCHER], action="decrease")
    _fetch(key_BSGQ, value_BSGV, tiles_BMN, count_BM, **scratch)

  @pl.when(role < FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    out_CV, lse_C = _attend(
      scale, query_BTHQ, words_BWT, tiles_BMN, count_BM, **scratch
    )
    batch, head, first = _place()
    rows = pl.ds(first, ROWS)
    lse_BHT[batch, head, rows] = lse_C
    target = scratch.get("out", scratch["query"]).at[role]
    gpu_tiles.store(out_CV, target, out_BTHV.at[batch, rows, head])


def _place():
  """Returns batch, head and first query of this warpgroup."""
  first = lax.axis_index("block") * BLOCK + lax.axis_index("role") * ROWS
  return lax.axis_index("batch"), lax.axis_index("head"), first


def _fetch(
  key_BSGQ,
  value_BSGV,
  tiles_BMN,
  count_BM,
  *,
  keys,
  values,
  key_full,
  value_full,
  key_empty,
  value_empty,
  **_,
):
  """Fetches the listed tiles."""
  batch, block = lax.axis_index("batch"), lax.axis_index("block")
  head = lax.axis_index("head") if key_BSGQ.shape[2] > 1 else 0
  count, tile = count_BM[batch, block], keys.shape[1]

  @pl.loop(0, count)
  def _(i):
    slot = lax.rem(i, SLOTS)
    rows = pl.ds(tiles_BMN[batch, block, i] * tile, tile)
    for source, target, full, empty in (
      (key_BSGQ, keys, key_full, key_empty),
      (value_BSGV, values, value_full, value_empty),
    ):
      pl.when(i >= SLOTS)(lambda x=empty: plgpu.barrier_wait(x.at[slot]))
      plgpu.copy_gmem_to_smem(
        source.at[batch, rows, head], target.at[slot], full.at[slot]
      )

  gpu_tiles.await_last(count, SLOTS, key_empty, value_empty)


def _attend(
  scale,
  query_BTHQ,
  words_BWT,
  tiles_BMN,
  count_BM,
  *,
  query,
  keys,
  values,
  query_here,
  key_full,
  value_full,
  key_empty,
  value_empty,
  query_rest=None,
  weights=None,
  **_,
):
  """Returns the output and log-sum-exps of 64 queries."""
  role, block = lax.axis_index("role"), lax.axis_index("block")
  batch, head, first = _place()
  tile, value_width = keys.shape[1], values.shape[2]
  queries = [x.at[role] for x in (query, query_rest) if x is not None]
  count, column = count_BM[batch, block], 0
  for part in queries:
    columns = pl.ds(column, part.shape[-1])
    source = query_BTHQ.at[batch, pl.ds(first, ROWS), head, columns]
    plgpu.copy_gmem_to_smem(source, part, query_here.at[role])
    column += part.shape[-1]
  plgpu.barrier_wait(query_here.at[role])

  def load_words(i):
    # Past the last tile those of the last: loaded, and not used.
    last = jnp.maximum(count - 1, 0)
    tile_index = tiles_BMN[batch, block, jnp.minimum(i, last)]
    return _load_words(words_BWT, batch, tile_index, first, tile)

  def step(i, carry):
    out_CV, top_C, sum_C, words = carry
    slot, next_words = lax.rem(i, SLOTS), load_words(i + 1)
    plgpu.barrier_wait(key_full.at[slot])
    score_CZ = gpu_tiles.products(_pairs(queries, keys.at[slot]))
    plgpu.barrier_arrive(key_empty.at[slot])
    score_CZ = jnp.where(_seen(words, tile), score_CZ * scale, gpu_tiles.HIDDEN)
    weight_CZ, factor_C, top_C, sum_C = gpu_tiles.softmax_step(
      score_CZ, top_C, sum_C
    )
    plgpu.barrier_wait(value_full.at[slot])
    out_CV = gpu_tiles.accumulate(
      out_CV * gpu_tiles.along_columns(factor_C, value_width),
      weight_CZ.astype(jnp.bfloat16),
      values.at[slot],
      interpret=weights is not None,
      staging=None if weights is None else weights.at[role],
    )
    plgpu.barrier_arrive(value_empty.at[slot])
    return out_CV, top_C, sum_C, next_words

  start = (
    gpu_tiles.zeros(value_width),
    gpu_tiles.vector(gpu_tiles.FLOOR),
    gpu_tiles.vector(0.0),
    load_words(0),
  )
  out_CV, top_C, sum_C, _ = lax.fori_loop(0, count, step, start)
  inverse_C, lse_C = gpu_tiles.softmax_end(top_C, sum_C)
  return out_CV * gpu_tiles.along_columns(inverse_C, value_width), lse_C


def _pairs(queries, key):
  """Pairs the column parts of the queries with those of the keys."""
  pairs, column = [], 0
  for part in queries:
    columns = pl.ds(column, part.shape[-1])
    pairs.append((part, key.at[:, columns]))
    column += part.shape[-1]
  return pairs


def _load_words(words_BWT, batch, tile_index, first, tile):
  """Loads the words of a tile for 64 queries; the softmax waits for them."""
  per_tile = tile // bitmask.BITS
  rows = pl.ds(first, ROWS)
  return tuple(
    gpu_tiles.load_rows(words_BWT.at[batch, tile_index * per_tile + i, rows])
    for i in range(per_tile)
  )


def _seen(words, tile):
  """Returns which keys of a tile 64 queries see, bool [64,Z]."""
  column_CZ = plgpu.broadcasted_iota(
    jnp.int32, (ROWS, tile), 1, layout=plgpu.Layout.WGMMA
  )
  word_CZ, *others = (gpu_tiles.along_columns(x, tile) for x in words)
  for i, other_CZ in enumerate(others, start=1):
    word_CZ = jnp.where(column_CZ >= i * bitmask.BITS, other_CZ, word_CZ)
  return ((word_CZ >> (column_CZ & (bitmask.BITS - 1))) & 1) != 0


def check(*arrays):
  """Raises ValueError for dtypes and widths that the kernels do not take."""
  for array in arrays:
    width = array.shape[3]
    if array.dtype != jnp.bfloat16:
      raise ValueError(f"{array.dtype=} must be bfloat16")
    if width % 64 or not 0 < width <= MAX_WIDTH:
      raise ValueError(f"{width=} must be a multiple of 64 up to {MAX_WIDTH}")
