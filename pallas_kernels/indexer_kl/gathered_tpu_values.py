"""Target mass and index score of each listed key, on a TPU core.

The table of packed keys stays in vector memory, 1536 bytes a key. As in
`sparse_mla.tpu` a grid step takes two lists in turn, and the rows of the next
are gathered, between the pieces of the computation, while one is computed:
scalar units and stores work beside the matrix units. Index lists come to scalar
memory by copies that start a list ahead.

A piece of 256 keys: it is unpacked and multiplied with the queries of all
attention heads and of all index heads, heads as sublanes, so that both sums
over heads, sum_h exp(scale s - lse_h) and sum_i w_i relu(dot_i), are additions
of registers, and a query leaves two numbers a key. They are made among the next
piece's products. Where gradients follow, the gathered index keys are written
too, in the order of the list, for a kernel to read without gathering.

Memory beside the table, at 128 heads of 512 + 64, 64 index heads of 128 and
N = 2048: two buffers of 3 MB of rows; of a list 0.2 MB of queries, 16 KB of
results, 0.5 MB of index keys, each four times, for two lists and the pipeline.
"""
# H heads, P padded width of a key, I index heads, K index width, N keys of a
# piece, L lanes; items lead in what is written: [items, 2, keys]

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.indexer_kl import gathered_tpu_rows as layouts
from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows

# Vector memory beside the table.
_ROOM = 15 * 2**20
# Most keys that are unpacked and multiplied at once.
_CHUNK = 256
# Rows of what is written of an item.
MASS, SCORE = range(2)


def values(how, layout, plan, table_GXL, queries, with_keys):
  """Returns (float32 [items,2,keys], [index keys of items] or []).

  Args:
    how: (interpret, pairs, scale).
    layout: of the table.
    plan: `tpu_plan.Plan`.
    table_GXL: packed keys.
    queries: arrays by query: attention [H,P] and its lse [1,H]; index [I,K]
      and its weight [1,I].
    with_keys: whether to write the index keys.
  """
  interpret, pairs, scale = how
  selected = plan.offsets.shape[-1]
  size, count = selected // plan.items, 2 * plan.items
  words = layout.words
  keys_shape = (size, rows.LANES)
  written = [((2, size), jnp.float32)]
  written += [(keys_shape, layout.dtype)] * with_keys
  blocks = [
    pl.BlockSpec((count, *shape), lambda j, m: (j, 0, 0))
    for shape, _ in written
  ]
  arrays = [
    jax.ShapeDtypeStruct((count * plan.num_steps, *shape), dtype)
    for shape, dtype in written
  ]
  return pl.pallas_call(
    functools.partial(_kernel, plan, layout, pairs, scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.num_steps,),
      in_specs=[
        pl.BlockSpec(memory_space=pl.ANY),
        plans.table_spec(plan, table_GXL),
        [plans.query_specs(plan, array.shape[1:]) for array in queries],
      ],
      out_specs=[blocks[0], blocks[1:]],
      scratch_shapes=[
        [pltpu.SMEM((1, selected), jnp.int32)] * 2,
        [pltpu.VMEM((words * selected, rows.LANES), jnp.int32)] * 2,
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=[arrays[0], arrays[1:]],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",),
      vmem_limit_bytes=4 * table_GXL[0].size + _ROOM,
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name="indexer_kl_gathered",
  )(
    plan.meta,
    rows.pair_lists(plan.offsets, words) if pairs else plan.offsets,
    table_GXL,
    [[array] * count for array in queries],
  )


def _kernel(
  plan,
  layout,
  pairs,
  scale,
  meta_ref,
  offsets_ref,
  table_ref,
  query_refs,
  out_ref,
  key_refs,
  list_refs,
  raw_refs,
  semaphores,
):
  def attend(which, gather):
    first = which * plan.items
    own_refs = [refs[first : first + plan.items] for refs in query_refs]
    _list(
      *(plan, layout, scale, own_refs, raw_refs[which], gather),
      *(first, out_ref, key_refs),
    )

  rows.gather_ahead(
    *(plan, pairs, layout.words, meta_ref, offsets_ref, table_ref),
    *(list_refs, raw_refs, semaphores, attend),
  )


def _list(
  plan,
  layout,
  scale,
  query_refs,
  raw_ref,
  gather,
  first,
  out_ref,
  key_refs,
):
  """Writes a list's items from `first` on; `gather` copies after a piece."""
  chunk = plan.chunk(_CHUNK)
  count = plan.offsets.shape[-1] // chunk
  pieces = count // plan.items
  products, columns = {}, []
  for piece in range(count + 1):
    if piece < count:
      item = piece // pieces
      key_NP, index_key_NK = layouts.unpack(
        layout, raw_ref, piece * chunk, chunk
      )
      products[piece] = _multiply(query_refs, item, key_NP, index_key_NK)
      if piece % pieces == 0:
        columns.append(_columns(query_refs, item, chunk))
      places = pl.ds(piece % pieces * chunk, chunk)
      for key_ref in key_refs:
        key_ref[first + item, places, :] = index_key_NK
      gather(piece * chunk, chunk)
    if piece:
      item = (piece - 1) // pieces
      mass_1N, score_1N = _reduce(
        scale, *columns[item], *products.pop(piece - 1)
      )
      places = pl.ds((piece - 1) % pieces * chunk, chunk)
      out_ref[first + item, MASS : MASS + 1, places] = mass_1N
      out_ref[first + item, SCORE : SCORE + 1, places] = score_1N


def _multiply(query_refs, item, key_NP, index_key_NK):
  """Returns the products of a piece with the queries of all heads."""
  attention_refs, _, index_refs, _ = query_refs
  lanes = ((1,), (1,))
  return (
    layouts.dot(attention_refs[item][...], key_NP, lanes),
    layouts.dot(index_refs[item][...], index_key_NK, lanes),
  )


def _columns(query_refs, item, chunk):
  """Returns lse and weight of the heads, beside a piece's products."""
  attention_refs, lse_refs, index_refs, weight_refs = query_refs
  return (
    layouts.column(lse_refs[item][...], attention_refs[item].shape[0], chunk),
    layouts.column(weight_refs[item][...], index_refs[item].shape[0], chunk),
  )


def _reduce(scale, lse_HN, weight_IN, product_HN, dot_IN):
  """Returns the mass and the score of a piece's keys, [1,N] each."""
  mass_HN = jnp.exp(scale * product_HN - lse_HN)
  score_IN = jnp.maximum(dot_IN, 0.0) * weight_IN
  return (
    jnp.sum(mass_HN, axis=0, keepdims=True),
    jnp.sum(score_IN, axis=0, keepdims=True),
  )
