"""Attention over gathered latents on Hopper tensor cores, forward: the kernel.

Tiles: a block takes 64 heads of one query and walks over its list of keys in
blocks of 64, up to the last that holds a key.
Pipeline: three warpgroups. The last gathers [latent | rope] rows into two slots
(`gpu_gather`). The first multiplies queries and keys, keeps the running maximum
and sum of an online softmax in registers, and hands the weights (bfloat16) and
the factor of what was summed so far to the second through shared memory. Both
add weights times latents, each to its half of the latent columns, in registers.
Memory of a block, in shared memory: queries 72 KB, two slots of 72 KB, weights
8 KB; no global memory beyond inputs and outputs.
Products are bfloat16, sums float32.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, N selected,
# Y all queries of the batch, Z all keys of the batch, D half of C

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.sparse_mla import gpu_gather

# Heads of a block, keys of a block, slots.
HEADS, KEYS, SLOTS = gpu_tiles.ROWS, gpu_gather.ROWS, 2
# Warpgroups.
SOFTMAX, OTHER, GATHER = 0, 1, 2
# Registers of a thread.
REGISTERS = gpu_tiles.register_shares(232, 200, 72)


def buffers(latent, rope, copies):
  """Describes the shared memory; `copies` fill a slot."""
  smem = gpu_tiles.smem
  return dict(
    query_latent=smem(2, HEADS, latent // 2),
    query_rope=smem(HEADS, rope),
    slots=smem(SLOTS, KEYS, latent + rope),
    weights=smem(HEADS, KEYS),
    factor=plgpu.SMEM((HEADS,), jnp.float32),
    query_here=plgpu.Barrier(num_arrivals=3),
    full=plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
    empty=plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
    weights_here=plgpu.Barrier(),
    weights_read=plgpu.Barrier(),
  )


def kernel(
  scale,
  interpret,
  query_latent_YHC,
  query_rope_YHR,
  latent_ZC,
  rope_ZR,
  rows_YN,
  blocks_Y,
  out_YHC,
  lse_YH,
  **scratch,
):
  """Attends with 64 heads of one query; scale has log2(e) inside."""
  role = lax.axis_index("role")
  query, heads = gpu_tiles.query_and_heads(query_rope_YHR.shape[1])
  place, num_blocks = (query, pl.ds(heads * HEADS, HEADS)), blocks_Y[query]

  @pl.when(role == GATHER)
  def _():
    plgpu.set_max_registers(REGISTERS[GATHER], action="decrease")
    _fetch_queries(place, query_latent_YHC, query_rope_YHR, **scratch)
    sources = (latent_ZC, rope_ZR, rows_YN)
    _fetch_keys(query, num_blocks, interpret, sources, **scratch)

  @pl.when(role == SOFTMAX)
  def _():
    plgpu.set_max_registers(REGISTERS[SOFTMAX], action="increase")
    out_HD, lse_YH[place] = _attend(
      query, num_blocks, scale, interpret, rows_YN, **scratch
    )
    _store(out_HD, 0, place, out_YHC, scratch["query_latent"])

  @pl.when(role == OTHER)
  def _():
    plgpu.set_max_registers(REGISTERS[OTHER], action="increase")
    out_HD = _follow(num_blocks, interpret, **scratch)
    _store(out_HD, 1, place, out_YHC, scratch["query_latent"])


def _store(out_HD, side, place, out_YHC, query_latent):
  """Writes one half of the columns; the queries are not needed any more."""
  half = out_HD.shape[1]
  columns = pl.ds(side * half, half)
  target = query_latent.at[side]
  gpu_tiles.store(out_HD, target, out_YHC.at[(*place, columns)])


def _fetch_queries(
  place,
  query_latent_YHC,
  query_rope_YHR,
  *,
  query_latent,
  query_rope,
  query_here,
  **_,
):
  half = query_latent.shape[-1]
  for side in range(2):
    columns = pl.ds(side * half, half)
    source = query_latent_YHC.at[(*place, columns)]
    plgpu.copy_gmem_to_smem(source, query_latent.at[side], query_here)
  source = query_rope_YHR.at[place]
  plgpu.copy_gmem_to_smem(source, query_rope, query_here)


def _fetch_keys(
  query, num_blocks, interpret, sources, *, slots, full, empty, **_
):
  """Gathers the listed keys, block after block."""
  *keys, rows_YN = sources

  def load_rows(block):
    # Past the last block those of the last: loaded, and not used.
    block = jnp.maximum(jnp.minimum(block, num_blocks - 1), 0)
    first = query * rows_YN.shape[1] + block * KEYS
    return first if interpret else gpu_gather.load_rows(rows_YN, first)

  def step(block, rows):
    slot = lax.rem(block, SLOTS)

    @pl.when(block >= SLOTS)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    target = slots.at[slot]
    if interpret:
      gpu_gather.fetch_tile(keys, rows, target, full.at[slot])
      return load_rows(block + 1)
    gpu_gather.start(keys, rows, target)
    rows = load_rows(block + 1)
    gpu_gather.finish()
    plgpu.barrier_arrive(full.at[slot])
    return rows

  lax.fori_loop(0, num_blocks, step, load_rows(0))
  gpu_tiles.await_last(num_blocks, SLOTS, empty)


def _attend(
  query,
  num_blocks,
  scale,
  interpret,
  rows_YN,
  *,
  query_latent,
  query_rope,
  slots,
  weights,
  factor,
  query_here,
  full,
  empty,
  weights_here,
  weights_read,
):
  """Scores and softmax, and the first half of the output's columns."""
  half = query_latent.shape[-1]
  plgpu.barrier_wait(query_here)

  def step(block, carry):
    out_HD, top_H, sum_H = carry
    slot = lax.rem(block, SLOTS)
    place = (query, pl.ds(block * KEYS, KEYS))
    row_N = gpu_tiles.load_columns(rows_YN.at[place])
    plgpu.barrier_wait(full.at[slot])
    score_HN = gpu_tiles.products(_pairs(query_latent, query_rope, slots, slot))
    score_HN = jnp.where(
      gpu_tiles.along_rows(row_N) >= 0, score_HN * scale, gpu_tiles.HIDDEN
    )
    weight_HN, factor_H, top_H, sum_H = gpu_tiles.softmax_step(
      score_HN, top_H, sum_H
    )

    @pl.when(block > 0)
    def _():
      plgpu.barrier_wait(weights_read)

    weights[...] = weight_HN.astype(jnp.bfloat16)
    factor[...] = factor_H
    plgpu.commit_smem()
    plgpu.barrier_arrive(weights_here)
    out_HD = gpu_tiles.accumulate(
      out_HD * gpu_tiles.along_columns(factor_H, half),
      weights,
      slots.at[slot, :, pl.ds(0, half)],
      interpret=interpret,
    )
    plgpu.barrier_arrive(empty.at[slot])
    return out_HD, top_H, sum_H

  start = (
    gpu_tiles.zeros(half),
    gpu_tiles.vector(gpu_tiles.FLOOR),
    gpu_tiles.vector(0.0),
  )
  out_HD, top_H, sum_H = lax.fori_loop(0, num_blocks, step, start)
  inverse_H, lse_H = gpu_tiles.softmax_end(top_H, sum_H)

  @pl.when(num_blocks > 0)
  def _():
    plgpu.barrier_wait(weights_read)

  factor[...] = inverse_H
  plgpu.commit_smem()
  plgpu.barrier_arrive(weights_here)
  return out_HD * gpu_tiles.along_columns(inverse_H, half), lse_H


def _follow(
  num_blocks,
  interpret,
  *,
  query_latent,
  slots,
  weights,
  factor,
  full,
  empty,
  weights_here,
  weights_read,
  **_,
):
  """The second half of the output's columns, with weights of `_attend`."""
  half = query_latent.shape[-1]

  def step(block, out_HD):
    slot = lax.rem(block, SLOTS)
    plgpu.barrier_wait(full.at[slot])
    plgpu.barrier_wait(weights_here)
    factor_H = gpu_tiles.load_rows(factor)
    out_HD = gpu_tiles.accumulate(
      out_HD * gpu_tiles.along_columns(factor_H, half),
      weights,
      slots.at[slot, :, pl.ds(half, half)],
      interpret=interpret,
    )
    plgpu.barrier_arrive(weights_read)
    plgpu.barrier_arrive(empty.at[slot])
    return out_HD

  out_HD = lax.fori_loop(0, num_blocks, step, gpu_tiles.zeros(half))
  plgpu.barrier_wait(weights_here)
  factor_H = gpu_tiles.load_rows(factor)
  return out_HD * gpu_tiles.along_columns(factor_H, half)


def _pairs(query_latent, query_rope, slots, slot):
  """Pairs the column parts of the queries with those of the keys."""
  half, rope = query_latent.shape[-1], query_rope.shape[-1]
  parts = [(query_latent.at[i], i * half, half) for i in range(2)]
  parts.append((query_rope, 2 * half, rope))
  return [
    (own, slots.at[slot, :, pl.ds(first, size)]) for own, first, size in parts
  ]
