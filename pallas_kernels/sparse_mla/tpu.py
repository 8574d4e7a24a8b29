"""Gathered attention on a TPU core, whose memory holds all keys.

The table of packed keys stays in vector memory (1536 bytes a key). A grid step
takes two queries in turn. While one is computed from its gathered rows, those
of the next are gathered into the other buffer, a piece after any two pieces of
the computation, so that scalar and vector units copy while the matrix units
multiply. Index lists come to scalar memory by copies started a query ahead, at
the seams between queries, for a copy's start or wait is a seam itself.

A query: its rows are unpacked and multiplied with the queries of all heads, a
chunk of 256 keys at a time. Either half of the N scores makes a softmax of its
own: the first's exponentials come among the second's products, the second's
among the first's weights times latents; at last both are merged. The latents
are unpacked once more for their products: stores are scarce, as the gathering
needs them.

Memory beside the table, at 128 heads and N = 2048: two buffers of 3 MB of
rows, 1 MB of scores and half of weights, 0.6 MB of queries and results, twice
for the pipeline.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, P padded
# width of a key, N selected, L lanes (128), I items (two a grid step)

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_pieces as pieces
from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows
from pallas_kernels.sparse_mla import tpu_segments as segments

# Vector memory beside the table.
_ROOM = 15 * 2**20
# Most keys that are unpacked and multiplied at once.
_CHUNK = 256
# Most keys of a list of items.
LIST_KEYS = 1536


def forward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
  *,
  is_sorted=False,
  interpret=False,
  chip=None,
):
  """Returns (out_latent_BTHC, lse_BTH); see the front for what they are.

  Args:
    query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR, indices_BTN,
      scale: as in the front.
    is_sorted: whether lists ascend and end in their -1.
    interpret: False, or parameters of the TPU interpreter.
    chip: which generation to run on; None asks the default device.
  """
  _check(query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR)
  batch, queries, heads, latent = query_latent_BTHC.shape
  keys = latent_BSC.shape[1]
  chip = chip or rows.this_chip()
  if keys > chip.forward_keys:
    return _by_segments(
      interpret,
      scale,
      chip,
      is_sorted,
      (query_latent_BTHC, query_rope_BTHR, indices_BTN),
      (latent_BSC, key_rope_BSR),
    )
  arranged = rows.arrange_queries(query_latent_BTHC, query_rope_BTHR, 16)
  plan = plans.plan_queries(indices_BTN, keys, rows.num_words(latent))
  table_BXL = rows.pack(latent_BSC, key_rope_BSR)
  out_IHC, lse_I1H = _attend(interpret, scale, chip, plan, table_BXL, arranged)
  out = out_IHC.reshape(batch, -1, *out_IHC.shape[1:])
  lse = lse_I1H.reshape(batch, -1, lse_I1H.shape[2])
  return out[:, :queries, :heads, :latent], lse[:, :queries, :heads]


def _check(query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR):
  """Raises ValueError unless all arrays are bfloat16 and the rope fits."""
  for array in (query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR):
    if array.dtype != jnp.bfloat16:
      raise ValueError(f"{array.dtype=} must be bfloat16 on a TPU")
  rope = key_rope_BSR.shape[-1]
  if rope >= rows.LANES:
    raise ValueError(f"{rope=} must be below {rows.LANES} on a TPU")


def _by_segments(interpret, scale, chip, is_sorted, query_arrays, key_arrays):
  queries, heads, latent = query_arrays[0].shape[1:]
  words = rows.num_words(latent)
  count, size = segments.split(key_arrays[0].shape[1], chip.forward_keys)
  tables_BGXL = segments.segment_tables(*key_arrays, count, size)
  chunks = [
    segments.by_chunks(array, chip.queries, fill)
    for array, fill in zip(query_arrays, (0, 0, -1))
  ]

  def batch_entry(inputs):
    table_GXL, *chunks_KTX = inputs

    def chunk(inputs):
      query_THC, query_THR, indices_TN = inputs
      cut = segments.cut_lists(
        indices_TN, count, size, words, LIST_KEYS, is_sorted
      )
      arranged = rows.arrange_queries(query_THC[None], query_THR[None], 16)
      # A block costs time to find and to wait for, so an item has but one.
      joined = [jnp.concatenate(arranged, axis=-1)]
      parts = _attend(interpret, scale, chip, cut.plan, table_GXL, joined)
      out_THC, lse_TH = segments.merge(cut, *parts)
      return out_THC[:, :heads, :latent], lse_TH[:, :heads]

    return lax.map(chunk, tuple(chunks_KTX))

  out, lse = lax.map(batch_entry, (tables_BGXL, *chunks))
  return (
    segments.from_chunks(out, queries),
    segments.from_chunks(lse, queries),
  )


def _attend(interpret, scale, chip, plan, table_BXL, arrays):
  """Returns (out, lse) of each item, from queries flat over the batch.

  `arrays` side by side are the queries, padded as keys are.
  """
  heads = arrays[0].shape[1]
  wide = sum(array.shape[2] for array in arrays) - rows.LANES
  selected = plan.offsets.shape[-1]
  words = wide // (2 * rows.LANES) + 1
  raw_scratch = pltpu.VMEM((words * selected, rows.LANES), jnp.int32)
  items = 2 * plan.items * plan.num_steps
  return pl.pallas_call(
    functools.partial(_kernel, plan, scale, chip.pairs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.num_steps,),
      in_specs=[
        pl.BlockSpec(memory_space=pl.ANY),
        plans.table_spec(plan, table_BXL),
        [plans.query_specs(plan, array.shape[1:]) for array in arrays],
      ],
      out_specs=[
        pl.BlockSpec((2 * plan.items, heads, wide), lambda j, m: (j, 0, 0)),
        pl.BlockSpec((2 * plan.items, 1, heads), lambda j, m: (j, 0, 0)),
      ],
      scratch_shapes=[
        [pltpu.SMEM((1, selected), jnp.int32)] * 2,
        [raw_scratch] * 2,
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((items, heads, wide), jnp.bfloat16),
      jax.ShapeDtypeStruct((items, 1, heads), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=4 * table_BXL[0].size + _ROOM,
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name="sparse_mla",
  )(
    plan.meta,
    rows.pair_lists(plan.offsets, words) if chip.pairs else plan.offsets,
    table_BXL,
    [[array] * (2 * plan.items) for array in arrays],
  )


def _kernel(
  plan,
  scale,
  pairs,
  meta_ref,
  offsets_ref,
  table_ref,
  array_refs,
  out_ref,
  lse_ref,
  list_refs,
  raw_refs,
  semaphores,
):
  words = raw_refs[0].shape[0] // list_refs[0].shape[1]

  def attend(which, gather):
    first = which * plan.items
    query_HPs = [
      jnp.concatenate([refs[n][...] for refs in array_refs], axis=1)
      for n in range(first, first + plan.items)
    ]
    chunk = plan.chunk(_CHUNK)
    queries = pieces.Queries(scale, chunk, query_HPs, raw_refs[which], words)
    share = chunk // 2
    count = queries.num_pieces
    for piece in range(count):
      queries.multiply_keys(piece)
      if piece >= count // 2:
        queries.exponentiate(piece - count // 2)
      gather(piece * share, share)
    for piece in range(count):
      queries.multiply_latents(piece)
      if piece < count // 2:
        queries.exponentiate(piece + count // 2)
      gather((count + piece) * share, share)
    queries.write(out_ref, lse_ref, first)

  rows.gather_ahead(
    *(plan, pairs, words, meta_ref, offsets_ref, table_ref),
    *(list_refs, raw_refs, semaphores, attend),
  )
