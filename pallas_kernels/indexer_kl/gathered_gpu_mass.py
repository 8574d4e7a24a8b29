"""Target masses of the gathered KL on Hopper tensor cores.

mass[n] = sum_h exp(scale q_h . k_n - lse_h), over all heads, for listed keys n.
Tiles: a block takes one query, 64 of its heads after the other, and for these
walks over the list of keys in blocks of 64, up to the last that holds a key.
Pipeline: three warpgroups. The last gathers [latent | rope] rows into two slots
(`gpu_gather`). Each of the others takes what comes into one slot, so that one
multiplies while the other takes exponentials. Products are keys x heads: the
sum over heads is within the rows of a warp's registers. What 64 heads leave is
added to what those before left in memory, by the warpgroup that wrote it.
Memory of a block, in shared memory: queries 72 KB and two slots of 72 KB.
Products are bfloat16, sums float32.
"""
# C queries, H heads, L latent width, R rope width, N listed keys, Z all keys of
# the batch, K keys of a block, G 64 heads

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.sparse_mla import gpu_gather

HEADS, KEYS = gpu_tiles.ROWS, gpu_gather.ROWS
# Warpgroups that multiply, each with a slot; the next one gathers.
PARTS = 2
GATHER = PARTS
REGISTERS = gpu_tiles.register_shares(*[200] * PARTS, 104)
# Columns of a piece of the queries.
PIECE = gpu_gather.COLUMNS


def masses(queries, lse_CH, keys, rows_CN, blocks_C, scale, *, interpret=False):
  """Returns float32 [C,N], unset past the last block of each query.

  Args:
    queries: bfloat16 [C,H,L] and [C,H,R], H, L and R multiples of 64.
    lse_CH: float32 log-sum-exp of each head; a large one hides a head.
    keys: bfloat16 [Z,L] and [Z,R].
    rows_CN: int32 rows of the keys, -1 for none, N a multiple of 64.
    blocks_C: int32 number of blocks of 64 keys.
    scale: factor of the products.
    interpret: what to give `plgpu.kernel` as `interpret`.
  """
  widths = [array.shape[-1] for array in keys]
  pieces = sum(widths) // PIECE
  copies = 1
  if interpret:
    # The interpreter knows no assembly: tiles of rows gathered before.
    keys = [array[jnp.maximum(rows_CN.reshape(-1), 0)] for array in keys]
    copies = gpu_gather.num_tile_copies(*widths)
  kernel = plgpu.kernel(
    functools.partial(_kernel, scale * math.log2(math.e), bool(interpret)),
    out_type=jax.ShapeDtypeStruct(rows_CN.shape, jnp.float32),
    grid=(rows_CN.shape[0],),
    grid_names=("query",),
    num_threads=GATHER + 1,
    thread_name="role",
    scratch_types=dict(
      query=gpu_tiles.smem(pieces, HEADS, PIECE),
      slots=gpu_tiles.smem(PARTS, KEYS, sum(widths)),
      query_here=plgpu.Barrier(num_arrivals=pieces),
      query_read=plgpu.Barrier(num_arrivals=PARTS),
      full=plgpu.Barrier(num_arrivals=copies, num_barriers=PARTS),
      empty=plgpu.Barrier(num_barriers=PARTS),
    ),
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    kernel_name="indexer_kl_masses",
  )
  lse_CH = lse_CH * math.log2(math.e)
  return kernel(*queries, lse_CH, *keys, rows_CN, blocks_C)


def _kernel(
  scale,
  interpret,
  query_latent_CHL,
  query_rope_CHR,
  lse_CH,
  latent_ZL,
  rope_ZR,
  rows_CN,
  blocks_C,
  mass_CN,
  **scratch,
):
  """Sums up the masses of one query; scale and lse have log2(e) inside."""
  role = lax.axis_index("role")
  blocks = blocks_C[lax.axis_index("query")]
  groups = range(lse_CH.shape[1] // HEADS)

  @pl.when(role == GATHER)
  def _():
    plgpu.set_max_registers(REGISTERS[GATHER], action="decrease")
    queries, keys = (query_latent_CHL, query_rope_CHR), (latent_ZL, rope_ZR)
    for group in groups:
      if group:
        plgpu.barrier_wait(scratch["query_read"])
      _fetch_query(queries, group, **scratch)
      _gather(keys, rows_CN, blocks, group, interpret, **scratch)
    plgpu.barrier_wait(scratch["query_read"])
    for slot in range(PARTS):
      last = scratch["empty"].at[slot]
      pl.when(blocks > slot)(lambda last=last: plgpu.barrier_wait(last))

  @pl.when(role < PARTS)
  def _():
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    for group in groups:
      _sum_up(scale, lse_CH, mass_CN, blocks, group, **scratch)
      plgpu.barrier_arrive(scratch["query_read"])


def _fetch_query(queries, group, *, query, query_here, **_):
  """Fetches 64 heads of the query, piece by piece."""
  row, piece = lax.axis_index("query"), 0
  heads = pl.ds(group * HEADS, HEADS)
  for source in queries:
    for first in range(0, source.shape[2], PIECE):
      own = source.at[row, heads, pl.ds(first, PIECE)]
      plgpu.copy_gmem_to_smem(own, query.at[piece], query_here)
      piece += 1


def _gather(
  keys, rows_CN, blocks, group, interpret, *, slots, full, empty, **_
):
  """Gathers the listed keys, block after block."""
  first = lax.axis_index("query") * rows_CN.shape[1]

  def load_rows(block):
    # Past the last block those of the last: loaded, and not used.
    block = jnp.maximum(jnp.minimum(block, blocks - 1), 0)
    entry = first + block * KEYS
    return entry if interpret else gpu_gather.load_rows(rows_CN, entry)

  def step(block, rows):
    slot = lax.rem(block, PARTS)
    # Each group fills all slots that have a block at all.
    pl.when((block >= PARTS) | (group > 0))(
      lambda: plgpu.barrier_wait(empty.at[slot])
    )
    target = slots.at[slot]
    if interpret:
      gpu_gather.fetch_tile(keys, rows, target, full.at[slot])
      return load_rows(block + 1)
    gpu_gather.start(keys, rows, target)
    rows = load_rows(block + 1)
    gpu_gather.finish()
    plgpu.barrier_arrive(full.at[slot])
    return rows

  lax.fori_loop(0, blocks, step, load_rows(0))


def _sum_up(
  scale,
  lse_CH,
  mass_CN,
  blocks,
  group,
  *,
  query,
  slots,
  query_here,
  full,
  empty,
  **_,
):
  """Adds the masses of 64 heads, of the blocks of own slot."""
  row, role = lax.axis_index("query"), lax.axis_index("role")
  lse_G = gpu_tiles.load_columns(lse_CH.at[row, pl.ds(group * HEADS, HEADS)])
  plgpu.barrier_wait(query_here)
  pairs = [
    (slots.at[role, :, pl.ds(i * PIECE, PIECE)], query.at[i])
    for i in range(query.shape[0])
  ]

  @pl.loop(0, lax.div(blocks - role + PARTS - 1, PARTS))
  def _(i):
    plgpu.barrier_wait(full.at[role])
    dot_KG = gpu_tiles.products(pairs)
    plgpu.barrier_arrive(empty.at[role])
    exponent_KG = dot_KG * scale - gpu_tiles.along_rows(lse_G)
    mass_K = jnp.sum(jnp.exp2(exponent_KG), axis=1)
    place = (row, pl.ds((i * PARTS + role) * KEYS, KEYS))
    if group:
      mass_K += gpu_tiles.load_rows(mass_CN.at[place])
    mass_CN[place] = mass_K
