"""Target masses of the masked KL on Hopper tensor cores.

mass[t, s] = sum_h exp(scale q_th . k_sh - lse_th) over all heads h.
Tiles: a block takes 128 queries and 128 keys and walks over the heads; tiles in
which no query sees a key are skipped and stay unwritten.
Pipeline: three warpgroups. The last fetches a head's queries and keys by TMA
into a ring. Each of the others takes 64 queries and sums up the masses of all
heads in registers, which are all that is ever stored.
Memory of a block, in shared memory: two heads of 96 KB for a width of 192; in
global memory [C,P] floats. Products are bfloat16, sums float32.
"""
# C queries, H heads, G key heads (1 or H), Q query and key width, P keys, M
# blocks of queries, N key tiles, R 64 queries, Z keys of a tile

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles

ROWS, TILE = gpu_tiles.ROWS, 128
# Warpgroups that multiply; the next one fetches.
PARTS = 2
FETCHER = PARTS
BLOCK = PARTS * ROWS
REGISTERS = gpu_tiles.register_shares(*[216] * PARTS, 72)
# Bytes of shared memory of the ring.
MAX_BYTES = 225 * 1024


def masses(query_CHQ, key_PGQ, lse_HC, live_MN, scale, *, interpret=False):
  """Returns float32 [C,P], unset in tiles that are not live.

  Args:
    query_CHQ: bfloat16, C a multiple of 128, Q one of 64 up to 256.
    key_PGQ: bfloat16, P a multiple of 128.
    lse_HC: float32 log-sum-exps; a large one hides a head.
    live_MN: int32, whether some of 128 queries see some of 128 keys.
    scale: factor of the products.
    interpret: what to give `plgpu.kernel` as `interpret`.
  """
  queries, _, width = query_CHQ.shape
  keys = key_PGQ.shape[0]
  slots = 2 if 4 * (BLOCK + TILE) * width <= MAX_BYTES else 1
  kernel = plgpu.kernel(
    functools.partial(_kernel, scale * math.log2(math.e)),
    out_type=jax.ShapeDtypeStruct((queries, keys), jnp.float32),
    grid=(queries // BLOCK, keys // TILE),
    grid_names=("block", "tile"),
    num_threads=FETCHER + 1,
    thread_name="role",
    scratch_types=dict(
      queries=gpu_tiles.smem(slots * PARTS, ROWS, width),
      keys=gpu_tiles.smem(slots, TILE, width),
      full=plgpu.Barrier(num_arrivals=PARTS + 1, num_barriers=slots),
      empty=plgpu.Barrier(num_arrivals=PARTS, num_barriers=slots),
    ),
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    kernel_name="indexer_kl_masked_masses",
  )
  return kernel(query_CHQ, key_PGQ, lse_HC * math.log2(math.e), live_MN)


def _kernel(
  scale,
  query_CHQ,
  key_PGQ,
  lse_HC,
  live_MN,
  mass_CP,
  *,
  queries,
  keys,
  full,
  empty,
):
  """Sums up the masses of one tile; scale and lse have log2(e) inside."""
  block, tile = lax.axis_index("block"), lax.axis_index("tile")
  role, slots = lax.axis_index("role"), keys.shape[0]
  live = live_MN[block, tile]
  steps = live * query_CHQ.shape[1]

  @pl.when(role == FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[FETCHER], action="decrease")

    @pl.loop(0, steps)
    def _(head):
      slot = lax.rem(head, slots)
      pl.when(head >= slots)(lambda: plgpu.barrier_wait(empty.at[slot]))
      for part in range(PARTS):
        rows = pl.ds(block * BLOCK + part * ROWS, ROWS)
        target = queries.at[slot * PARTS + part]
        plgpu.copy_gmem_to_smem(query_CHQ.at[rows, head], target, full.at[slot])
      own = head if key_PGQ.shape[1] > 1 else 0
      source = key_PGQ.at[pl.ds(tile * TILE, TILE), own]
      plgpu.copy_gmem_to_smem(source, keys.at[slot], full.at[slot])

    gpu_tiles.await_last(steps, slots, empty)

  @pl.when(role < PARTS)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    rows = pl.ds(block * BLOCK + role * ROWS, ROWS)

    def step(head, mass_RZ):
      slot = lax.rem(head, slots)
      lse_R = gpu_tiles.load_rows(lse_HC.at[head, rows])
      plgpu.barrier_wait(full.at[slot])
      own = queries.at[slot * PARTS + role]
      dot_RZ = gpu_tiles.products([(own, keys.at[slot])])
      plgpu.barrier_arrive(empty.at[slot])
      exponent_RZ = dot_RZ * scale - gpu_tiles.along_columns(lse_R, TILE)
      return mass_RZ + jnp.exp2(exponent_RZ)

    mass_RZ = lax.fori_loop(0, steps, step, gpu_tiles.zeros(TILE))

    @pl.when(live > 0)
    def _():
      mass_CP[rows, pl.ds(tile * TILE, TILE)] = mass_RZ
