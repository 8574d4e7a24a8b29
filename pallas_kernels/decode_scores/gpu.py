"""Index scores over a paged cache of keys on Hopper tensor cores.

Grid (request, split): a request's keys are split over blocks, so that few
requests fill the device too. A block walks over its tiles of 256 keys up to the
request's length, and writes -inf past it.
Pipeline: five warpgroups. One reads the page table and fetches the pages of a
tile, keys and scales, by TMA into a ring. Each of the others multiplies 64 keys
of the tile with the query's heads, as keys x heads, so that ReLU, weights and
the sum over heads need no other warp, and writes 64 scores straight to memory.
Both sides of the product are float8 or both bfloat16. Of float8 the tensor
cores add up the 128 terms with fewer bits than float32 has; all else is
float32.
Memory of a block, in shared memory: in float8 the query 8 KB, and four tiles of
keys and scales of 33 KB; in bfloat16 16 KB, and three tiles of 65 KB. In global
memory inputs and outputs alone.
"""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request (N*Z, then whole tiles), I index heads, K index width,
# C keys of a warpgroup

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles

# Heads and width of the index queries, filled up with zeros.
HEADS, WIDTH = 64, 128
# Keys of a page that this takes; keys of a tile, and of a warpgroup's part.
PAGES = (32, 64, 128, 256)
TILE, PART = 256, gpu_tiles.ROWS
FETCHER = TILE // PART
REGISTERS = gpu_tiles.register_shares(*[112] * FETCHER, 32)
# Blocks that keep a device busy, and most tiles of a block.
BLOCKS, MAX_STEPS = 264, 16
# Tiles of the ring, by type.
STAGES = {"float8_e4m3fn": 4, "bfloat16": 3}


def scores(
  query_BIK,
  weight_BI,
  page_PZK,
  scale_PZ,
  table_BN,
  lengths_B,
  *,
  interpret=False,
):
  """Returns float32 [B,N*Z]; see the front.

  Keys narrower than 128 are filled up, which copies the cache.

  Raises:
    ValueError: query and keys that are not both float8_e4m3fn or both bfloat16,
      more than 64 heads, a width of more than 128, or a page size that is not
      32, 64, 128 or 256.
  """
  batch, num_pages = table_BN.shape
  page_size, width = page_PZK.shape[1:]
  heads = query_BIK.shape[1]
  dtype = page_PZK.dtype
  if dtype != query_BIK.dtype or dtype.name not in STAGES:
    raise ValueError(
      f"{query_BIK.dtype=} and {dtype=} of the keys must be one of {[*STAGES]}"
    )
  if heads > HEADS or width > WIDTH:
    raise ValueError(f"{query_BIK.shape=}: at most {HEADS=}, {WIDTH=}")
  if page_size not in PAGES:
    raise ValueError(f"{page_PZK.shape=}: {page_size=} is not one of {PAGES}")
  keys, scaled = num_pages * page_size, scale_PZ is not None
  tiles = -(-keys // TILE)
  steps = max(1, min(MAX_STEPS, batch * tiles // BLOCKS))
  narrow, stages = WIDTH - width, STAGES[dtype.name]
  swizzled = (
    plgpu.TilingTransform((8, 128 // dtype.itemsize)),
    plgpu.SwizzleTransform(128),
  )
  scratch = dict(
    query=plgpu.SMEM((HEADS, WIDTH), dtype, transforms=swizzled),
    ring=plgpu.SMEM((stages, TILE, WIDTH), dtype, transforms=swizzled),
    query_here=plgpu.Barrier(),
    full=plgpu.Barrier(
      num_arrivals=(2 if scaled else 1) * TILE // page_size,
      num_barriers=stages,
    ),
    empty=plgpu.Barrier(num_arrivals=FETCHER, num_barriers=stages),
  )
  if scaled:
    scratch["scales"] = plgpu.SMEM((stages, TILE), jnp.float32)
  kernel = plgpu.kernel(
    functools.partial(_kernel, steps),
    out_type=jax.ShapeDtypeStruct((batch, tiles * TILE), jnp.float32),
    grid=(batch, -(-tiles // steps)),
    grid_names=("request", "split"),
    num_threads=FETCHER + 1,
    thread_name="part",
    scratch_types=scratch,
    # Safe, and no waits in a tile: no thread reads what a thread writes.
    compiler_params=gpu_tiles.parameters().replace(
      unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
    kernel_name="decode_scores",
  )
  score_BS = kernel(
    jnp.pad(query_BIK, [(0, 0), (0, HEADS - heads), (0, narrow)]),
    jnp.pad(weight_BI.astype(jnp.float32), [(0, 0), (0, HEADS - heads)]),
    jnp.pad(page_PZK, [(0, 0), (0, 0), (0, narrow)]),
    jnp.pad(table_BN, [(0, 0), (0, tiles * TILE // page_size - num_pages)]),
    lengths_B,
    *([scale_PZ.astype(jnp.float32)] if scaled else []),
  )
  return score_BS[:, :keys]


def _kernel(
  steps,
  query_BIK,
  weight_BI,
  page_PZK,
  table_BN,
  lengths_B,
  *refs,
  query,
  ring,
  query_here,
  full,
  empty,
  scales=None,
):
  """Scores one request's tiles of one split."""
  *scale, score_BS = refs
  stages = ring.shape[0]
  request, part = lax.axis_index("request"), lax.axis_index("part")
  first = lax.axis_index("split") * steps
  stop = jnp.minimum(first + steps, score_BS.shape[1] // TILE)
  length = lengths_B[request]
  used = jnp.clip(lax.div(length + TILE - 1, TILE), first, stop)

  @pl.when(part == FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[FETCHER], action="decrease")
    plgpu.copy_gmem_to_smem(query_BIK.at[request], query, query_here)
    page_size = page_PZK.shape[1]
    pages = TILE // page_size

    @pl.loop(0, used - first)
    def _(i):
      stage = lax.rem(i, stages)
      pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
      for j in range(pages):
        page = table_BN[request, (first + i) * pages + j]
        rows = pl.ds(j * page_size, page_size)
        for source, target in zip((page_PZK, *scale), (ring, scales)):
          plgpu.copy_gmem_to_smem(
            source.at[page], target.at[stage, rows], full.at[stage]
          )

    gpu_tiles.await_last(used - first, stages, empty)

  @pl.when(part < FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    weight_I = gpu_tiles.load_columns(weight_BI.at[request])
    plgpu.barrier_wait(query_here)

    def place(tile):
      return request, pl.ds(tile * TILE + part * PART, PART)

    @pl.loop(0, used - first)
    def _(i):
      stage, rows = lax.rem(i, stages), pl.ds(part * PART, PART)
      plgpu.barrier_wait(full.at[stage])
      dot_CI = gpu_tiles.products([(ring.at[stage, rows], query)])
      factor_C = gpu_tiles.load_rows(scales.at[stage, rows]) if scale else 1.0
      plgpu.barrier_arrive(empty.at[stage])
      term_CI = jnp.maximum(dot_CI, 0.0) * gpu_tiles.along_rows(weight_I)
      score_C = jnp.sum(term_CI, axis=1) * factor_C
      index_C = plgpu.broadcasted_iota(
        jnp.int32, (PART,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
      )
      seen_C = index_C < length - (first + i) * TILE - part * PART
      score_BS[place(first + i)] = jnp.where(seen_C, score_C, -jnp.inf)

    @pl.loop(used, stop)
    def _(tile):
      score_BS[place(tile)] = gpu_tiles.vector(-jnp.inf)
