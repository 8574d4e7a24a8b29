"""Gradients of gathered attention on a TPU core: of arrays, from the kernel's.

Where keys and their gradients exceed vector memory, chunks of queries visit
segments of keys in turn, and add to the keys' gradients in HBM.
"""
# B batch, T queries (of a chunk), S keys, H heads, C latent width, R rope
# width, P padded width of a key, N selected, G segments, K chunks, I items, X
# rows of a table, L lanes

from jax import lax
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_backward_kernel as kernel
from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows
from pallas_kernels.sparse_mla import tpu_segments as segments

# Most keys of a list of items.
LIST_KEYS = 1024


def backward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
  out_BTHC,
  lse_BTH,
  d_out_BTHC,
  *,
  is_sorted=False,
  interpret=False,
  chip=None,
):
  """Returns the gradients of the four arrays in their dtypes.

  Args:
    query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR, indices_BTN,
      scale: as in the front.
    out_BTHC, lse_BTH: what forward returned.
    d_out_BTHC: cotangent of out.
    is_sorted: whether lists ascend and end in their -1.
    interpret: False, or parameters of the TPU interpreter.
    chip: which generation to run on; None asks the default device.
  """
  batch, queries, heads, latent = query_latent_BTHC.shape
  keys, rope = key_rope_BSR.shape[1:]
  words = rows.num_words(latent)
  wide = (words - 1) * 2 * rows.LANES
  chip = chip or rows.this_chip()
  query_arrays = (
    query_latent_BTHC,
    query_rope_BTHR,
    out_BTHC,
    lse_BTH,
    d_out_BTHC,
  )
  if keys > chip.backward_keys:
    d_query, d_rope, d_key = _by_segments(
      interpret,
      scale,
      chip,
      is_sorted,
      (*query_arrays, indices_BTN),
      (latent_BSC, key_rope_BSR),
    )
  else:
    plan = plans.plan_queries(indices_BTN, keys, words)
    tables = (
      rows.pack(latent_BSC, key_rope_BSR),
      kernel.empty(batch, keys, words),
    )
    arrays, lines = rows.arrange_gradients(*query_arrays)
    both, d_table = kernel.gradients(
      interpret, scale, chip, plan, keys, tables, arrays, plan.by_item(lines)
    )
    both = both.reshape(batch, -1, *both.shape[1:])[:, :queries, :heads]
    d_query, d_rope = both[..., :latent], both[..., wide : wide + rope]
    d_key = kernel.flat_keys(d_table, keys, words)
  return (
    d_query.astype(query_latent_BTHC.dtype),
    d_rope.astype(query_rope_BTHR.dtype),
    d_key[:, :keys, :latent].astype(latent_BSC.dtype),
    d_key[:, :keys, wide : wide + rope].astype(key_rope_BSR.dtype),
  )


def _by_segments(interpret, scale, chip, is_sorted, query_arrays, key_arrays):
  """Returns (d_query_BTHC, d_rope_BTHR, d_key_BSP), by chunks of queries."""
  queries, heads, latent = query_arrays[0].shape[1:]
  rope = query_arrays[1].shape[-1]
  words = rows.num_words(latent)
  wide = (words - 1) * 2 * rows.LANES
  count, size = segments.split(key_arrays[0].shape[1], chip.backward_keys)
  tables_BGXL = segments.segment_tables(*key_arrays, count, size)
  chunks = [
    segments.by_chunks(array, chip.queries, fill)
    for array, fill in zip(query_arrays, (0, 0, 0, 0, 0, -1))
  ]

  def batch_entry(inputs):
    table_GXL, *chunks_KTX = inputs

    def chunk(d_table_GXL, inputs):
      *arrays, indices_TN = inputs
      cut = segments.cut_lists(
        indices_TN, count, size, words, LIST_KEYS, is_sorted
      )
      arranged, lines = rows.arrange_gradients(*(a[None] for a in arrays))
      # A block costs time to find and to wait for, so an item has but one.
      both_IHP, d_table_GXL = kernel.gradients(
        interpret,
        scale,
        chip,
        cut.plan,
        size,
        (table_GXL, d_table_GXL),
        [jnp.concatenate(arranged, axis=-1)],
        cut.plan.by_item(lines),
      )
      both_THP = segments.add_items(cut, both_IHP)[:, :heads]
      both_THP = both_THP.astype(both_IHP.dtype)
      parts = both_THP[..., :latent], both_THP[..., wide : wide + rope]
      return d_table_GXL, parts

    zeros = kernel.empty(count, size, words)
    d_table_GXL, parts = lax.scan(chunk, zeros, tuple(chunks_KTX))
    d_key_GSP = kernel.flat_keys(d_table_GXL, size, words)
    return d_key_GSP.reshape(count * size, -1), *parts

  d_key_BSP, *parts = lax.map(batch_entry, (tables_BGXL, *chunks))
  d_query, d_rope = (segments.from_chunks(part, queries) for part in parts)
  return d_query, d_rope, d_key_BSP
