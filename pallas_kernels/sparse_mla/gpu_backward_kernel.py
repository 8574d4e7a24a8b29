"""Attention over gathered latents on Hopper tensor cores, backward: the kernel.

Tiles: a block takes 64 heads of one query and walks over its list of keys in
blocks of 64, up to the last that holds a key.
Pipeline: three warpgroups. The first recomputes the weights from the
log-sum-exps, the second the gradients of the scores from them; both go to
shared memory (bfloat16), where all find them. The third gathers [latent | rope]
rows into one slot (`gpu_gather`). The first two own half of the latent columns
each, the third the rotary ones: each sums up the gradient of its columns of the
queries in registers and, once the slot is free for the next rows, makes the
gradient of the gathered rows 64 columns at a time and adds it to that of all
keys by atomic additions of four floats.
Memory of a block, in shared memory: queries and rows 72 KB each, cotangents
64 KB, weights and score gradients 8 KB each; in global memory the float32
gradient of [latent | rope]. Products are bfloat16, sums float32; the order of
the atomic sums, and so their rounding, changes from run to run.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, X their
# sum, N selected, Y all queries of the batch, Z all keys of the batch, D
# columns of a part, K keys of a block

import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.sparse_mla import gpu_gather

HEADS, KEYS = gpu_tiles.ROWS, gpu_gather.ROWS
# Warpgroups.
WEIGHTS, SCORES, GATHER = 0, 1, 2
# Registers of a thread.
REGISTERS = gpu_tiles.register_shares(200, 200, 104)
# Columns of a piece of queries and cotangents, and of a gradient of rows.
PIECE = 64
LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
  """What the kernel reads; global memory."""

  query_latent_YHC: jax.Array
  query_rope_YHR: jax.Array
  d_out_YHC: jax.Array
  lse_YH: jax.Array
  mean_YH: jax.Array
  latent_ZC: jax.Array
  rope_ZR: jax.Array
  rows_YN: jax.Array
  blocks_Y: jax.Array


def buffers(inputs, copies):
  """Describes the shared memory; `copies` fill a slot."""
  smem = gpu_tiles.smem
  latent, rope = inputs.latent_ZC.shape[1], inputs.rope_ZR.shape[1]
  pieces = latent // PIECE
  return dict(
    query=smem(pieces + 1, HEADS, PIECE),
    d_out=smem(pieces, HEADS, PIECE),
    slot=smem(1, KEYS, latent + rope),
    weights=smem(1, HEADS, KEYS),
    d_scores=smem(1, HEADS, KEYS),
    query_here=plgpu.Barrier(num_arrivals=2 * pieces + 1),
    full=plgpu.Barrier(num_arrivals=copies),
    empty=plgpu.Barrier(num_arrivals=3),
    weights_here=plgpu.Barrier(),
    d_scores_here=plgpu.Barrier(),
    both_read=plgpu.Barrier(num_arrivals=3),
  )


def kernel(scale, interpret, *refs, **scratch):
  """Sums up the gradients of 64 heads of one query."""
  inputs, (d_latent_YHC, d_rope_YHR, d_key) = Inputs(*refs[:-3]), refs[-3:]
  role = lax.axis_index("role")

  for own in (WEIGHTS, SCORES, GATHER):

    @pl.when(role == own)
    def _():
      action = "decrease" if own == GATHER else "increase"
      plgpu.set_max_registers(REGISTERS[own], action=action)
      if own == GATHER:
        _fetch_queries(inputs, **scratch)
      sum_HD = _sum_up(inputs, own, d_key, scale, interpret, **scratch)
      pieces = sum_HD.shape[1] // PIECE
      first = own * scratch["d_out"].shape[0] // 2
      place = _place(inputs)
      for i in range(pieces):
        if own == GATHER:
          target = d_rope_YHR.at[place]
        else:
          columns = pl.ds((first + i) * PIECE, PIECE)
          target = d_latent_YHC.at[(*place, columns)]
        piece_HD = sum_HD[:, i * PIECE : (i + 1) * PIECE]
        gpu_tiles.store(piece_HD, scratch["query"].at[first + i], target)


def _place(inputs):
  """Returns the query, and the slice of the heads, of this block."""
  query, heads = gpu_tiles.query_and_heads(inputs.query_rope_YHR.shape[1])
  return query, pl.ds(heads * HEADS, HEADS)


def _entry(inputs, block):
  """Returns the first entry in `rows_YN` of a block, through its axes."""
  return _place(inputs)[0] * inputs.rows_YN.shape[1] + block * KEYS


def _fetch_queries(inputs, *, query, d_out, query_here, **_):
  place, pieces = _place(inputs), d_out.shape[0]
  copies = [(inputs.query_rope_YHR.at[place], query.at[pieces])]
  for i in range(pieces):
    here = (*place, pl.ds(i * PIECE, PIECE))
    copies.append((inputs.query_latent_YHC.at[here], query.at[i]))
    copies.append((inputs.d_out_YHC.at[here], d_out.at[i]))
  for source, target in copies:
    plgpu.copy_gmem_to_smem(source, target, query_here)


def _start_keys(inputs, interpret, block, *, slot, full, **_):
  """Begins to gather the keys of one block."""
  slot, first = slot.at[0], _entry(inputs, block)
  sources = (inputs.latent_ZC, inputs.rope_ZR)
  if interpret:
    gpu_gather.fetch_tile(sources, first, slot, full)
  else:
    numbers = gpu_gather.load_rows(inputs.rows_YN, first)
    gpu_gather.start(sources, numbers, slot)


def _finish_keys(interpret, *, full, **_):
  if not interpret:
    gpu_gather.finish()
    plgpu.barrier_arrive(full)


def _sum_up(inputs, own, d_key, scale, interpret, **scratch):
  """Returns the gradient of own columns of the queries, float32.

  Of a half of the latent columns, or of the rotary ones if `own` is `GATHER`.
  """
  num_blocks = inputs.blocks_Y[_place(inputs)[0]]
  half = scratch["d_out"].shape[0] * PIECE // 2
  first, width = own * half, PIECE if own == GATHER else half
  vector_H = None
  if own == GATHER:

    @pl.when(num_blocks > 0)
    def _():
      _start_keys(inputs, interpret, 0, **scratch)
      _finish_keys(interpret, **scratch)
  else:
    place = _place(inputs)
    vector = inputs.lse_YH if own == WEIGHTS else inputs.mean_YH
    vector_H = gpu_tiles.load_rows(vector.at[place])
  plgpu.barrier_wait(scratch["query_here"])

  def step(block, sum_HD):
    plgpu.barrier_wait(scratch["full"])
    own_scratch = {**scratch, **_places(block, **scratch)}
    if own == WEIGHTS:
      _make_weights(inputs, block, vector_H, scale, **own_scratch)
    if own == SCORES:
      _make_d_scores(block, vector_H, scale, **own_scratch)
    else:
      plgpu.barrier_wait(scratch["d_scores_here"])
    sum_HD = gpu_tiles.accumulate(
      sum_HD,
      own_scratch["d_scores"],
      own_scratch["slot"].at[:, pl.ds(first, width)],
      interpret=interpret,
    )
    plgpu.barrier_arrive(scratch["empty"])
    more = block + 1 < num_blocks
    if own == GATHER:

      @pl.when(more)
      def _():
        plgpu.barrier_wait(scratch["empty"])
        _start_keys(inputs, interpret, block + 1, **scratch)

    pieces = dict(query=scratch["query"], d_out=scratch["d_out"])
    _add_rows(inputs, own, interpret, d_key, block, **{**own_scratch, **pieces})
    plgpu.barrier_arrive(scratch["both_read"])
    if own == GATHER:
      pl.when(more)(lambda: _finish_keys(interpret, **scratch))
    return sum_HD

  sum_HD = lax.fori_loop(0, num_blocks, step, gpu_tiles.zeros(width))
  last = scratch["empty"] if own == GATHER else scratch["both_read"]
  pl.when(num_blocks > 0)(lambda: plgpu.barrier_wait(last))
  return sum_HD


def _places(block, *, query, d_out, slot, weights, d_scores, **_):
  """Returns the shared memory of a step.

  It is the same at every step, but the compiler must not know: it would keep
  the addresses of some hundred operands in registers that the sums need.
  """
  same = lax.shift_right_logical(block, 24)
  return dict(
    query=[query.at[i + same] for i in range(query.shape[0])],
    d_out=[d_out.at[i + same] for i in range(d_out.shape[0])],
    slot=slot.at[same],
    weights=weights.at[same],
    d_scores=d_scores.at[same],
  )


def _make_weights(
  inputs,
  block,
  lse_H,
  scale,
  *,
  query,
  slot,
  weights,
  both_read,
  weights_here,
  **_,
):
  """Writes the softmax weights of one block."""
  place = (_place(inputs)[0], pl.ds(block * KEYS, KEYS))
  row_K = gpu_tiles.load_columns(inputs.rows_YN.at[place])
  score_HK = gpu_tiles.products(_pairs(query, slot))
  exponent_HK = score_HK * (scale * LOG2_E)
  exponent_HK -= gpu_tiles.along_columns(lse_H, KEYS)
  weight_HK = jnp.where(
    gpu_tiles.along_rows(row_K) >= 0, jnp.exp2(exponent_HK), 0.0
  )

  @pl.when(block > 0)
  def _():
    plgpu.barrier_wait(both_read)

  weights[...] = weight_HK.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.barrier_arrive(weights_here)


def _make_d_scores(
  block,
  mean_H,
  scale,
  *,
  d_out,
  slot,
  weights,
  d_scores,
  both_read,
  weights_here,
  d_scores_here,
  **_,
):
  """Writes the gradients of the scores of one block."""
  d_weight_HK = gpu_tiles.products(_pairs(d_out, slot))
  d_weight_HK -= gpu_tiles.along_columns(mean_H, KEYS)

  @pl.when(block > 0)
  def _():
    plgpu.barrier_wait(both_read)

  plgpu.barrier_wait(weights_here)
  weight_HK = gpu_tiles.load_tile(weights).astype(jnp.float32)
  d_score_HK = weight_HK * d_weight_HK * scale
  d_scores[...] = d_score_HK.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.barrier_arrive(d_scores_here)


def _pairs(pieces, slot):
  """Pairs pieces with columns of the keys."""
  return [
    (piece, slot.at[:, pl.ds(i * PIECE, PIECE)])
    for i, piece in enumerate(pieces)
  ]


def _add_rows(
  inputs, own, interpret, d_key, block, *, query, d_out, weights, d_scores, **_
):
  """Adds own columns of the gradients of gathered rows to those of all keys."""
  rows_YN, pieces = inputs.rows_YN, d_out.shape[0]
  entry = _entry(inputs, block)

  def add(piece, pairs):
    d_row_KD = gpu_tiles.transposed_products(pairs)
    if interpret:
      # The gradients of one block of heads follow those of another.
      num_heads = inputs.query_rope_YHR.shape[1]
      heads = gpu_tiles.query_and_heads(num_heads)[1]
      place = entry + heads * (rows_YN.shape[0] * rows_YN.shape[1])
      columns = pl.ds(piece * PIECE, PIECE)
      d_key[pl.ds(place, KEYS), columns] = d_row_KD
    else:
      gpu_gather.add_tile(d_row_KD, d_key, rows_YN, entry, piece * PIECE)

  if own == GATHER:
    add(pieces, [(d_scores, query.at[pieces])])
    return

  @pl.loop(own * pieces // 2, (own + 1) * pieces // 2)
  def _(i):
    add(i, [(d_scores, query.at[i]), (weights, d_out.at[i])])
