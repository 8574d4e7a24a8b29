"""Gradients of the masked KL on Hopper tensor cores, from slopes.

With s the slopes of the loss by the scores and g = s[t, n] where q_ti . k_n is
positive, two passes of one kernel, which differ in what stays and what streams:
- the 64 index heads of a query stay, keys stream: u_i = sum_n g k_n, of which
  XLA makes dq_i = w_i u_i and dw_i = q_i . u_i;
- 64 keys stay, queries stream, plain and times weights: dk_n = sum_ti g w q_ti.
Tiles: 128 rows that stay, 64 for each of two warpgroups (two queries, or 128
keys); tiles of 64 rows stream (64 keys, or a query) through a ring that a third
warpgroup fills by TMA.
Pipeline of a tile: a product of 64 x 64, g in registers (bfloat16), and from
there a product into a sum that stays in registers.
Memory of a block, in shared memory: 32 KB that stay and four tiles of 16 KB, or
of 32 KB. Products are bfloat16, sums float32.
"""
# C queries, I index heads (64), K index width (128), P keys, X rows that stay
# (heads of all queries, or keys), M blocks of 128 of them, R 64 rows, D 64 rows
# of a tile

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles

ROWS, WIDTH = gpu_tiles.ROWS, 128
# Warpgroups that multiply; the next one fetches. Tiles of the ring.
PARTS, SLOTS = 2, 4
FETCHER = PARTS
BLOCK = PARTS * ROWS
REGISTERS = gpu_tiles.register_shares(*[208] * PARTS, 88)


def of_queries(query_CIK, key_PK, slope_CP, last_C, *, interpret=False):
  """Returns u, float32 [C,I,K].

  Args:
    query_CIK: bfloat16 index queries, C a multiple of 2.
    key_PK: bfloat16 index keys, P a multiple of 64.
    slope_CP: float32 slopes, 0 where a query does not see a key.
    last_C: int32 last key that each query sees, or -1.
    interpret: what to give `plgpu.kernel` as `interpret`.
  """
  stop_M = jnp.max(last_C.reshape(-1, PARTS), axis=1) // ROWS + 1
  ranges = (jnp.zeros_like(stop_M), stop_M)
  query_XK = query_CIK.reshape(-1, WIDTH)
  u_XK = _run(query_XK, [key_PK], slope_CP, ranges, False, interpret)
  return u_XK.reshape(query_CIK.shape)


def of_keys(
  query_CIK, pulled_CIK, key_PK, slope_CP, last_C, *, interpret=False
):
  """Returns the gradient of the keys, float32 [P,K].

  Args:
    query_CIK, key_PK, slope_CP, last_C, interpret: as for `of_queries`, P a
      multiple of 128.
    pulled_CIK: bfloat16 index queries times weights.
  """
  first_M = BLOCK * jnp.arange(key_PK.shape[0] // BLOCK, dtype=jnp.int32)
  sees_MC = last_C >= first_M[:, None]
  index_C = jnp.arange(last_C.shape[0], dtype=jnp.int32)
  stop_M = jnp.max(jnp.where(sees_MC, index_C + 1, 0), axis=1)
  start_M = jnp.min(jnp.where(sees_MC, index_C, last_C.shape[0]), axis=1)
  ranges = (jnp.minimum(start_M, stop_M), stop_M)
  streams = [x.reshape(-1, WIDTH) for x in (query_CIK, pulled_CIK)]
  return _run(key_PK, streams, slope_CP, ranges, True, interpret)


def _run(own_XK, streams, slope_CP, ranges, of_keys, interpret):
  """Returns the sums of the rows that stay, float32 [X,K]."""
  smem, count = gpu_tiles.smem, len(streams)
  scratch = dict(
    stay=smem(PARTS, ROWS, WIDTH),
    ring=smem(SLOTS * count, ROWS, WIDTH),
    own_here=plgpu.Barrier(num_barriers=PARTS),
    full=plgpu.Barrier(num_arrivals=count, num_barriers=SLOTS),
    empty=plgpu.Barrier(num_arrivals=PARTS, num_barriers=SLOTS),
  )
  if interpret:
    scratch["staging"] = smem(PARTS, ROWS, ROWS)
  kernel = plgpu.kernel(
    functools.partial(_kernel, of_keys),
    out_type=jax.ShapeDtypeStruct(own_XK.shape, jnp.float32),
    grid=(own_XK.shape[0] // BLOCK,),
    grid_names=("block",),
    num_threads=FETCHER + 1,
    thread_name="role",
    scratch_types=scratch,
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    kernel_name="indexer_kl_masked_" + ("keys" if of_keys else "queries"),
  )
  return kernel(own_XK, *streams, slope_CP, *ranges)


def _kernel(of_keys, own_XK, *refs, stay, own_here, **scratch):
  """Sums up the gradients of 128 rows."""
  *streams, slope_CP, start_M, stop_M, sum_XK = refs
  block, role = lax.axis_index("block"), lax.axis_index("role")
  start = start_M[block]
  steps = stop_M[block] - start

  @pl.when(role == FETCHER)
  def _():
    plgpu.set_max_registers(REGISTERS[FETCHER], action="decrease")
    _fetch(streams, start, steps, **scratch)

  @pl.when(role < PARTS)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    own = block * PARTS + role
    rows = pl.ds(own * ROWS, ROWS)
    here = own_here.at[role]
    plgpu.copy_gmem_to_smem(own_XK.at[rows], stay.at[role], here)
    plgpu.barrier_wait(here)

    def load_slopes(i):
      """Loads slopes of a tile, for its columns or for the rows that stay."""
      if of_keys:
        slope_R = gpu_tiles.load_rows(slope_CP.at[start + i, rows])
        return gpu_tiles.along_columns(slope_R, ROWS)
      columns = pl.ds((start + i) * ROWS, ROWS)
      return gpu_tiles.along_rows(
        gpu_tiles.load_columns(slope_CP.at[own, columns])
      )

    sum_XK[rows] = _sum_up(stay.at[role], load_slopes, steps, **scratch)


def _fetch(streams, start, steps, *, ring, full, empty, **_):
  """Fetches tiles, each of all that streams."""

  @pl.loop(0, steps)
  def _(i):
    slot = lax.rem(i, SLOTS)
    pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(empty.at[slot]))
    for j, source in enumerate(streams):
      target = ring.at[slot * len(streams) + j]
      rows = pl.ds((start + i) * ROWS, ROWS)
      plgpu.copy_gmem_to_smem(source.at[rows], target, full.at[slot])

  gpu_tiles.await_last(steps, SLOTS, empty)


def _sum_up(own, load_slopes, steps, *, ring, full, empty, staging=None):
  """Returns the sums of 64 rows, float32."""
  count = ring.shape[0] // SLOTS
  if staging is not None:
    staging = staging.at[lax.axis_index("role")]

  def step(i, sum_RK):
    slot = lax.rem(i, SLOTS)
    slope_RD = load_slopes(i)
    plgpu.barrier_wait(full.at[slot])
    first, last = ring.at[slot * count], ring.at[slot * count + count - 1]
    dot_RD = gpu_tiles.products([(own, first)])
    gated_RD = jnp.where(dot_RD > 0.0, slope_RD, 0.0).astype(jnp.bfloat16)
    sum_RK = gpu_tiles.accumulate(
      sum_RK,
      gated_RD,
      last,
      interpret=staging is not None,
      staging=staging,
    )
    plgpu.barrier_arrive(empty.at[slot])
    return sum_RK

  return lax.fori_loop(0, steps, step, gpu_tiles.zeros(WIDTH))
