"""The KL loss over listed keys as TPU kernels.

`gathered_tpu_values` gathers the keys of a list from a table in vector memory,
that of the latents with the index keys in it, and leaves each listed key's
target mass and index score, 8 bytes a key. XLA makes the KL and its slopes of
them. `gathered_tpu_gradient` makes gradients of slopes and of the index keys
that the first kernel wrote in list order, and adds the keys' to their rows.

More keys than a table holds are cut into segments, a query into items of single
segments (`sparse_mla.tpu_segments`); both kernels run over the same items, and
sums over a query's items are XLA's. Queries go in chunks of at most 512, for
the index keys of a chunk stand in HBM, 0.5 MB a query of 2048.
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# C latent, R rope width, P padded width of a key, N selected, G segments, X
# rows of a table, L lanes, M items of a query; J all items, Z places of one

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.indexer_kl import gathered_tpu_gradient as gradient
from pallas_kernels.indexer_kl import gathered_tpu_rows as layouts
from pallas_kernels.indexer_kl import gathered_tpu_values as values
from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows
from pallas_kernels.sparse_mla import tpu_segments as segments

# Queries whose index keys are kept at a time.
_QUERIES = 512
# Most keys of a list where there are segments.
LIST_KEYS = 1024
# Log-sum-exp of a head that does not count.
_NONE = 1e30


class _How(NamedTuple):
  """Static facts of a run: segments of `size` keys, and how kernels run."""

  interpret: object
  scale: float
  layout: layouts.Layout
  count: int
  size: int
  pairs: bool
  is_sorted: bool = False


class _Chunk(NamedTuple):
  """Arrays of a chunk of queries as the kernels read them."""

  attention_THP: jax.Array
  lse_T1H: jax.Array
  query_TIK: jax.Array
  weight_TI: jax.Array
  indices_TN: jax.Array
  cotangent_T: jax.Array | None


def evaluate(
  scale,
  trained,
  constants,
  weight_BT,
  *,
  is_sorted=False,
  interpret=False,
  chip=None,
):
  """Returns (kl_BT, gradients of sum(weight kl) by `trained`, or None).

  Args:
    scale, trained, constants, weight_BT: as for `gathered.evaluate`.
    is_sorted: whether lists ascend and end in their -1.
    interpret: False, or parameters of the TPU interpreter.
    chip: which generation to run on; None asks the default device.
  """
  query_BTIK, key_BSK, weight_BTI = trained
  *queries, latent_BSC, rope_BSR, lse_BTH, indices_BTN = constants
  for width in (key_BSK.shape[2], rope_BSR.shape[2]):
    if width > rows.LANES:
      raise ValueError(f"{width=} must be at most {rows.LANES} on a TPU")
  how = _choose(interpret, scale, chip or rows.this_chip(), trained, constants)
  how = how._replace(is_sorted=is_sorted)
  keys = (latent_BSC, rope_BSR, key_BSK)
  tables_BGXL = _tables(how, keys)
  num_queries = indices_BTN.shape[1]
  chunks = [
    segments.by_chunks(array, _QUERIES, fill)
    for array, fill in zip(
      (*queries, lse_BTH, query_BTIK, weight_BTI, indices_BTN),
      (0, 0, 0, 0, 0, -1),
    )
  ]
  if weight_BT is not None:
    chunks.append(segments.by_chunks(weight_BT, _QUERIES))
  kl, gradients = lax.map(
    lambda inputs: _entry(how, *inputs), (tables_BGXL, chunks)
  )
  kl_BT = segments.from_chunks(kl, num_queries)
  if weight_BT is None:
    return kl_BT, None
  d_query, d_weight, d_key_BSK = gradients
  return kl_BT, (
    segments.from_chunks(d_query, num_queries).astype(query_BTIK.dtype),
    d_key_BSK[:, : key_BSK.shape[1], : key_BSK.shape[2]].astype(key_BSK.dtype),
    segments.from_chunks(d_weight, num_queries).astype(weight_BTI.dtype),
  )


def _choose(interpret, scale, chip, trained, constants):
  """Returns how to run: the keys' layout and segments."""
  layout = layouts.choose_layout(
    constants[0].shape[3], *trained[:2], *constants[:4]
  )
  # Tables are as large as those of bfloat16 latents of 512 and 64 would be.
  limit = max(8, chip.forward_keys * 3 // layout.words)
  count, size = segments.split(constants[2].shape[1], limit)
  pairs = chip.pairs and 2 * layout.words <= 8
  return _How(interpret, scale, layout, count, size, pairs)


def _tables(how, keys):
  """Returns the packed tables [B,G,X,L] of latent, rope and index key."""

  def cut(array_BSX):
    missing = how.count * how.size - array_BSX.shape[1]
    padded = jnp.pad(array_BSX, [(0, 0), (0, missing), (0, 0)])
    return padded.reshape(-1, how.size, array_BSX.shape[-1])

  table = layouts.pack(how.layout, *map(cut, keys))
  return table.reshape(-1, how.count, *table.shape[1:])


def _entry(how, table_GXL, chunks):
  """Returns (kl, gradients or None) of a batch entry, a chunk at a time."""
  shape = (how.count, gradient.num_rows(how.size), rows.LANES)
  d_key_GXK, (kl, by_query) = lax.scan(
    lambda d_key_GXK, arrays: _chunk(how, table_GXL, d_key_GXK, arrays),
    jnp.zeros(shape, jnp.float32),
    chunks,
  )
  if by_query is None:
    return kl, None
  d_key_SK = d_key_GXK[:, : how.size].reshape(-1, rows.LANES)
  return kl, (*by_query, d_key_SK)


def _chunk(how, table_GXL, d_key_GXK, arrays):
  """Returns d_key_GXK with a chunk's share, and the chunk's results."""
  heads, width = arrays[3].shape[1:]
  chunk = _arrange(how.layout, *arrays)
  cut, query_J = _cut(how, chunk.indices_TN)
  seen_JZ = layouts.listed(cut.plan, how.size, how.layout.words)
  graded = chunk.cotangent_T is not None
  out_J2Z, keys = values.values(
    (how.interpret, how.pairs, how.scale),
    *(how.layout, cut.plan, table_GXL),
    (
      *(chunk.attention_THP, chunk.lse_T1H, chunk.query_TIK),
      layouts.lines(chunk.weight_TI),
    ),
    graded,
  )
  kl_T, slope_JZ = _kl(cut, query_J, seen_JZ, out_J2Z)
  if not graded:
    return d_key_GXK, (kl_T, None)
  slope_JZ *= chunk.cotangent_T[query_J, None]
  weight_TI1 = chunk.weight_TI[..., None]
  pulled_TIK = (chunk.query_TIK * weight_TI1).astype(how.layout.dtype)
  u_JIK, d_key_GXK = gradient.gradients(
    how.interpret,
    *(how.layout, cut.plan, (chunk.query_TIK, pulled_TIK)),
    *((slope_JZ[:, None], *keys), d_key_GXK),
  )
  u_TIK = segments.add_items(cut, u_JIK)
  d_weight_TI = jnp.sum(u_TIK * chunk.query_TIK, axis=-1)
  d_query_TIK = (u_TIK * weight_TI1)[:, :heads, :width]
  return d_key_GXK, (kl_T, (d_query_TIK, d_weight_TI[:, :heads]))


def _arrange(
  layout,
  latent_THC,
  rope_THR,
  lse_TH,
  query_TIK,
  weight_TI,
  indices_TN,
  cotangent_T=None,
):
  """Pads a chunk's arrays as the kernels want them, heads to 16."""
  flat = lambda array_THX, width: rows.flat_heads(
    array_THX[None].astype(layout.dtype), width, 16
  )
  latent, rope = flat(latent_THC, layout.wide), flat(rope_THR, rows.LANES)
  lse_TH = jnp.where(lse_TH == -jnp.inf, _NONE, lse_TH)
  weight_TI = weight_TI.astype(jnp.float32)
  return _Chunk(
    jnp.concatenate([latent, rope], axis=-1),
    layouts.lines(lse_TH, _NONE),
    flat(query_TIK, rows.LANES),
    jnp.pad(weight_TI, [(0, 0), (0, -weight_TI.shape[1] % 16)]),
    indices_TN,
    cotangent_T,
  )


def _cut(how, indices_TN):
  """Returns (`segments.Cut`, the query of each item)."""
  queries = indices_TN.shape[0]
  words = how.layout.words
  if how.count > 1:
    cut = segments.cut_lists(
      indices_TN, how.count, how.size, words, LIST_KEYS, how.is_sorted
    )
    meta = cut.plan.meta.reshape(cut.plan.num_steps, -1)
    return cut, meta[:, 2:].reshape(-1)
  plan = plans.plan_queries(indices_TN[None], how.size, words)
  item_TM = jnp.arange(queries)[:, None]
  cut = segments.Cut(plan, item_TM, jnp.ones_like(item_TM, bool))
  return cut, jnp.minimum(jnp.arange(2 * plan.num_steps), queries - 1)


def _kl(cut, query_J, seen_JZ, out_J2Z):
  """Returns (kl_T, its slope by the score of each item's places)."""

  def fold(reduce, array_JZ, nothing):
    """Reduces over a query's items."""
    whole_J = reduce(array_JZ, axis=1)
    return reduce(jnp.where(cut.used_TM, whole_J[cut.item_TM], nothing), axis=1)

  spread = lambda array_T: array_T[query_J, None]
  mass_JZ = jnp.where(seen_JZ, out_J2Z[:, values.MASS], 0.0)
  score_JZ = jnp.where(seen_JZ, out_J2Z[:, values.SCORE], -jnp.inf)
  mass_T = fold(jnp.sum, mass_JZ, 0.0)
  best_T = fold(jnp.max, score_JZ, -jnp.inf)
  best_T = jnp.where(best_T == -jnp.inf, 0.0, best_T)
  shifted_JZ = score_JZ - spread(best_T)
  total_T = fold(jnp.sum, jnp.exp(shifted_JZ), 0.0)
  log_total_T = jnp.log(jnp.where(total_T > 0, total_T, 1.0))
  log_model_JZ = shifted_JZ - spread(log_total_T)
  held_T = mass_T != 0
  target_JZ = mass_JZ / spread(jnp.where(held_T, mass_T, 1.0))
  used_JZ = target_JZ != 0
  log_target_JZ = jnp.log(jnp.where(used_JZ, target_JZ, 1.0))
  kl_JZ = jnp.where(used_JZ, target_JZ * (log_target_JZ - log_model_JZ), 0.0)
  slope_JZ = jnp.where(spread(held_T), jnp.exp(log_model_JZ) - target_JZ, 0.0)
  return fold(jnp.sum, kl_JZ, 0.0), slope_JZ
