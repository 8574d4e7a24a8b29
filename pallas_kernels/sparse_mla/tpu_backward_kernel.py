"""Gradients of gathered attention on a TPU core, whose memory holds all keys.

As in `tpu`, a grid step takes two queries, and keys are gathered between pieces
of the computation: during a query those of the next. Beside the table of
packed keys stands the float32 gradient of all its keys, 2560 bytes a key. It is
read from HBM at the table's first step and written back at its last.

A query: its own vectors lie over the gradients of its outputs, [q | rope] over
[d_out | 0]. A chunk of 512 keys is unpacked and multiplied with both at once,
keys as rows: scores and the weights' gradients appear side by side, and
log-sum-exp and mean are lanes, so nothing is reduced. From weights p and score
gradients ds come [ds | p] times both again, the keys' gradients, and ds^T times
the keys, the query's. The keys' gradients go through a staging buffer and are
added to their rows in memory during the next chunk, be it the next query's, 4
or 8 loads before as many stores. These stand a quarter or an eighth of a chunk
apart, for a sorted list's repeated keys must not meet in a batch; lists where
some do are added one row after the other.

Memory beside table and gradient, at 128 heads and N = 2048: two buffers of
3 MB of rows, two of 1.3 MB of staged gradients, 1 MB a chunk, 2 MB of queries
and results.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, P padded
# width of a key, N selected, L lanes (128), I items (two a grid step), Y twice
# the heads, X rows of a table

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_pieces as pieces
from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows

# Vector memory beside table and gradient.
_ROOM = 16 * 2**20
# Most keys that are unpacked and multiplied at once.
_CHUNK = 512
# Lists of an item: first words of its keys; first rows of their gradients, of
# all chunks but the last, and of the last.
_LIST, _HEAD, _TAIL = range(3)


def gradients(interpret, scale, chip, plan, num_keys, tables, arrays, lines):
  """Returns d_query_IHP, bfloat16 by item, and gradients of tables, float32.

  Args:
    interpret, scale, chip: as in `tpu_backward.backward`.
    plan: what to visit.
    num_keys: of a table.
    tables: packed keys, and what the gradients of theirs are added to, laid
      out as `empty` does.
    arrays: side by side the queries and the gradients of their outputs.
    lines: of each item lse over mean, float32 [I,2,H].
  """
  words = _num_words(arrays)
  run = functools.partial(
    _call, interpret, scale, chip.pairs, plan, tables, arrays, lines
  )
  pairs = chip.pairs
  gather = rows.gather_pairs if pairs else rows.gather
  add = functools.partial(rows.add, chip.additions)
  marker = words * num_keys + rows.FRONT
  return lax.cond(
    rows.repeats_meet(chip.additions, plan.offsets, plan.chunk(_CHUNK), marker),
    lambda: run(
      functools.partial(rows.gather_loop, pairs),
      rows.add_serially,
      name="sparse_mla_backward_serial",
    ),
    lambda: run(gather, add, name="sparse_mla_backward"),
  )


def empty(num_tables, num_keys, words):
  """Returns zeros, a row of 128 lanes after another, for all and the marker."""
  size = rows.round_up((2 * words - 1) * (num_keys + 1), 8)
  return jnp.zeros((num_tables, size, rows.LANES), jnp.float32)


def flat_keys(gradient_BXL, num_keys, words):
  """Returns the gradients of a table's keys, float32 [B,S,P]."""
  used = gradient_BXL[:, : (2 * words - 1) * num_keys]
  return used.reshape(used.shape[0], num_keys, -1)


def _num_words(arrays):
  """Returns how many rows a key takes, from [query | rope | d_out]."""
  width = sum(array.shape[2] for array in arrays)
  return (width // rows.LANES - 1) // 4 + 1


def _call(
  interpret,
  scale,
  pairs,
  plan,
  tables,
  arrays,
  lines,
  gather_rows,
  add_rows,
  *,
  name,
):
  """Runs the kernel, under a name, with ways to gather and to add rows."""
  heads, selected = lines.shape[-1], plan.offsets.shape[-1]
  words = _num_words(arrays)
  groups, width = 2 * words - 1, (2 * words - 1) * rows.LANES
  chunk, count = plan.chunk(_CHUNK), 2 * plan.items
  table_BXL, gradient_BXL = tables
  gradient_rows = gradient_BXL.shape[1]
  list_scratch = lambda size: pltpu.SMEM((1, size), jnp.int32)
  raw_scratch = pltpu.VMEM((words * selected, rows.LANES), jnp.int32)
  stage_scratch = pltpu.VMEM((groups * chunk, rows.LANES), jnp.float32)
  # The lists of places in the gradient, where a key takes other rows.
  places = (plan.offsets - rows.FRONT) // words * groups
  heads_I1N, tails_I1N = jnp.split(places, [selected - chunk], axis=-1)
  return pl.pallas_call(
    functools.partial(_kernel, plan, scale, pairs, gather_rows, add_rows),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.num_steps,),
      in_specs=[
        *[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        plans.table_spec(plan, table_BXL),
        pl.BlockSpec((count, 2, heads), lambda j, m: (j, 0, 0)),
        [plans.query_specs(plan, array.shape[1:]) for array in arrays],
      ],
      out_specs=[
        pl.BlockSpec((count, heads, width), lambda j, m: (j, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
      ],
      scratch_shapes=[
        pltpu.VMEM((gradient_rows, rows.LANES), jnp.float32),
        [list_scratch(selected)] * 2,
        [list_scratch(selected - chunk)] * 2,
        [list_scratch(chunk)] * 2,
        [raw_scratch] * 2,
        [stage_scratch] * 2,
        pltpu.SemaphoreType.DMA((7,)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(
        (count * plan.num_steps, heads, width), jnp.bfloat16
      ),
      jax.ShapeDtypeStruct(gradient_BXL.shape, jnp.float32),
    ],
    input_output_aliases={1: 1},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=4 * table_BXL[0].size
      + 4 * gradient_rows * rows.LANES
      + _ROOM,
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name=name,
  )(
    plan.meta,
    gradient_BXL,
    rows.pair_lists(plan.offsets, words) if pairs else plan.offsets,
    heads_I1N,
    tails_I1N,
    table_BXL,
    lines,
    [[array] * count for array in arrays],
  )


def _kernel(
  plan,
  scale,
  pairs,
  gather_rows,
  add_rows,
  meta_ref,
  before_ref,
  offsets_ref,
  heads_ref,
  tails_ref,
  table_ref,
  lines_ref,
  array_refs,
  d_query_ref,
  d_table_ref,
  gradient_ref,
  list_refs,
  head_refs,
  tail_refs,
  raw_refs,
  stage_refs,
  semaphores,
):
  step = pl.program_id(0)
  chunk = tail_refs[0].shape[1]
  count = list_refs[0].shape[1] // chunk
  words = raw_refs[0].shape[0] // list_refs[0].shape[1]

  def fetch(kind, place):
    """Copies a list, `place` after the step's first."""
    source = (offsets_ref, heads_ref, tails_ref)[kind]
    target = (list_refs, head_refs, tail_refs)[kind][place % 2]
    return pltpu.make_async_copy(
      source.at[2 * step + place], target, semaphores.at[2 * kind + place % 2]
    )

  @pl.when(plan.is_live(step, meta_ref))
  def _():
    @pl.when(plan.is_first(step, meta_ref))
    def _():
      before = pltpu.make_async_copy(
        before_ref.at[plan.table(step, meta_ref)],
        gradient_ref,
        semaphores.at[6],
      )
      before.start()
      fetch(_LIST, 0).start()
      fetch(_LIST, 0).wait()
      selected = list_refs[0].shape[1]
      rows.gather_loop(
        pairs, table_ref, list_refs[0], raw_refs[0], words, 0, selected
      )
      rows.clear(stage_refs[1])
      before.wait()
      fetch(_LIST, 1).start()
      fetch(_HEAD, 0).start()
      # Zeros at the second's places stand for the query before the first.
      fetch(_TAIL, 1).start()

    for which in range(2):
      fetch(_LIST, which + 1).wait()
      fetch(_HEAD, which).wait()
      fetch(_TAIL, 1 - which).wait()
      fetch(_LIST, which + 2).start()
      fetch(_HEAD, which + 1).start()
      fetch(_TAIL, which).start()
      gather = functools.partial(
        gather_rows,
        table_ref,
        list_refs[1 - which],
        raw_refs[1 - which],
        words,
      )
      first = which * plan.items
      arrays = [
        [*(refs[n][...] for refs in array_refs), lines_ref[n]]
        for n in range(first, first + plan.items)
      ]
      queries = pieces.Gradients(scale, chunk, arrays, raw_refs[which], words)
      queries.multiply_keys(0)
      gather(0, chunk)
      for piece in range(count):
        if piece < count - 1:
          queries.multiply_keys(piece + 1)
          gather((piece + 1) * chunk, chunk)
        queries.differentiate(piece, stage_refs[piece % 2])
        if piece:
          places, start = head_refs[which], (piece - 1) * chunk
        else:
          places, start = tail_refs[1 - which], 0
        add_rows(gradient_ref, places, stage_refs[1 - piece % 2], start, chunk)
      for item, d_query_HP in enumerate(queries.d_queries):
        d_query_ref[first + item] = d_query_HP.astype(d_query_ref.dtype)

    @pl.when(plan.is_last(step, meta_ref))
    def _():
      fetch(_LIST, 3).wait()
      fetch(_HEAD, 2).wait()
      fetch(_TAIL, 1).wait()
      rows.add_serially(gradient_ref, tail_refs[1], stage_refs[1], 0, chunk)
      copy = pltpu.make_async_copy(
        gradient_ref,
        d_table_ref.at[plan.table(step, meta_ref)],
        semaphores.at[6],
      )
      copy.start()
      copy.wait()
