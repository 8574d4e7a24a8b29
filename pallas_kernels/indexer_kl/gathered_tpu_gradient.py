"""Gradients of the gathered KL on a TPU core, from slopes that are known.

The items are those of `gathered_tpu_values`, whose index keys lie in order in
HBM. The float32 gradient of a table's index keys stays in vector memory, 512
bytes a key: it is read at the table's first step and written at its last.

A piece of 512 keys: with s_n the weighted slope, g = s_n where q_i . k_n > 0,
[I,N], is made from a product; u += g k, and the keys' gradients, g^T (w q), go
to a staging buffer. While a list is computed, the staged rows of the list
before are added to theirs, 16 loads before as many stores; the keys of such a
batch are of one item, thus of one query, which lists none twice. What follows
from u, dq_i = w_i u_i and dw_i = q_i . u_i, is left to XLA.

Memory beside the gradient, at 64 index heads of 128 and N = 2048: two staging
buffers of 1 MB; of a list 0.5 MB of keys and 64 KB of queries and results, each
four times, for two lists and the pipeline.
"""
# I index heads, K index width, N keys of a piece, G tables, X rows of a table's
# gradient; items lead in what is read by item: [items, keys, K]

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.indexer_kl import gathered_tpu_rows as layouts
from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows

# Vector memory beside the gradient.
_ROOM = 15 * 2**20
# Most keys that are multiplied at once.
_CHUNK = 512
# Rows that are loaded before any is stored: a row has one sublane, so that the
# wait for a load counts for more than in attention's gradient.
_ADDITIONS = 16


def num_rows(keys):
  """Returns the rows of a gradient of so many keys and of no key."""
  return rows.round_up(keys + 1, 8)


def gradients(interpret, layout, plan, queries, by_item, d_key_GXK):
  """Returns (u by item, float32 [items,I,K]; d_key_GXK with all added).

  Args:
    interpret: False, or parameters of the TPU interpreter.
    layout: of the keys.
    plan: `tpu_plan.Plan`.
    queries: arrays by query: index queries [I,K] and the same times weights.
    by_item: weighted slopes [items,1,keys] and index keys [items,keys,K].
    d_key_GXK: the gradient so far.
  """
  selected, count = plan.offsets.shape[-1], 2 * plan.items
  gradient_shape = d_key_GXK.shape[1:]
  u_shape = (*queries[0].shape[1:-1], rows.LANES)
  places = (plan.offsets - rows.FRONT) // layout.words
  block = lambda shape: pl.BlockSpec((count, *shape), lambda j, m: (j, 0, 0))
  stage = pltpu.VMEM((selected, rows.LANES), jnp.float32)
  inputs = [
    places,
    [[array] * count for array in queries],
    list(by_item),
    d_key_GXK,
  ]
  # The last input, after what the grid prefetches.
  last = len(jax.tree.leaves(inputs))
  return pl.pallas_call(
    functools.partial(_kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.num_steps,),
      in_specs=[
        pl.BlockSpec(memory_space=pl.ANY),
        [plans.query_specs(plan, array.shape[1:]) for array in queries],
        [block(array.shape[1:]) for array in by_item],
        pl.BlockSpec(memory_space=pl.ANY),
      ],
      out_specs=[block(u_shape), pl.BlockSpec(memory_space=pl.ANY)],
      scratch_shapes=[
        pltpu.VMEM(gradient_shape, jnp.float32),
        [pltpu.SMEM((1, selected), jnp.int32)] * 2,
        [stage] * 2,
        pltpu.SemaphoreType.DMA((3,)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((count * plan.num_steps, *u_shape), jnp.float32),
      jax.ShapeDtypeStruct(d_key_GXK.shape, jnp.float32),
    ],
    input_output_aliases={last: 1},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=4 * d_key_GXK[0].size + _ROOM,
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name="indexer_kl_gathered_gradients",
  )(plan.meta, *inputs)


def _kernel(
  plan,
  meta_ref,
  places_ref,
  query_refs,
  item_refs,
  _,
  u_ref,
  d_key_ref,
  gradient_ref,
  list_refs,
  stage_refs,
  semaphores,
):
  step = pl.program_id(0)
  selected = list_refs[0].shape[1]

  def fetch(which):
    """Copies one of the step's two lists."""
    return pltpu.make_async_copy(
      places_ref.at[2 * step + which], list_refs[which], semaphores.at[which]
    )

  @pl.when(plan.is_live(step, meta_ref))
  def _():
    table = d_key_ref.at[plan.table(step, meta_ref)]

    @pl.when(plan.is_first(step, meta_ref))
    def _():
      read = pltpu.make_async_copy(table, gradient_ref, semaphores.at[2])
      read.start()
      # Zeros at the second's places stand for the list before the first.
      rows.clear(stage_refs[1])
      fetch(1).start()
      read.wait()

    for which in range(2):
      fetch(1 - which).wait()
      fetch(which).start()
      first = which * plan.items
      add = functools.partial(
        _add, gradient_ref, list_refs[1 - which], stage_refs[1 - which]
      )
      _list(plan, query_refs, item_refs, stage_refs[which], add, first, u_ref)

    @pl.when(plan.is_last(step, meta_ref))
    def _():
      fetch(1).wait()
      rows.add_serially(gradient_ref, list_refs[1], stage_refs[1], 0, selected)
      write = pltpu.make_async_copy(gradient_ref, table, semaphores.at[2])
      write.start()
      write.wait()


def _add(gradient_ref, list_ref, stage_ref, start, size):
  """Adds staged rows of list positions [start, start + size) to their own."""
  staged_ref = stage_ref.at[pl.ds(start, size)]
  rows.add(_ADDITIONS, gradient_ref, list_ref, staged_ref, start, size)


def _list(plan, query_refs, item_refs, stage_ref, add, first, u_ref):
  """Stages a list's gradients and writes u from `first` on.

  After each piece `add` adds as many rows of the list before.
  """
  chunk = plan.chunk(_CHUNK)
  pieces = plan.offsets.shape[-1] // chunk // plan.items
  for item in range(plan.items):
    u_IK = 0.0
    for piece in range(pieces):
      start = (item * pieces + piece) * chunk
      u_IK += _piece(
        *(query_refs, item_refs, first + item),
        *(pl.ds(piece * chunk, chunk), stage_ref, start),
      )
      add(start, chunk)
    u_ref[first + item] = u_IK


def _piece(query_refs, item_refs, item, places, stage_ref, start):
  """Stages the gradients of a piece's keys and returns its share of u."""
  query_IK, pulled_IK = (refs[item][...] for refs in query_refs)
  slope_ref, key_ref = item_refs
  key_NK = key_ref[item, places, :]
  dot_IN = layouts.dot(query_IK, key_NK, ((1,), (1,)))
  slope_1N = slope_ref[item, :, places]
  gated_IN = jnp.where(dot_IN > 0, slope_1N, 0.0).astype(key_NK.dtype)
  d_key_NK = layouts.dot(gated_IN, pulled_IK, ((0,), (0,)))
  stage_ref[pl.ds(start, key_NK.shape[0]), :] = d_key_NK
  return layouts.dot(gated_IN, key_NK, ((1,), (0,)))
