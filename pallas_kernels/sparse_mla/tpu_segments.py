"""More keys than a TPU core's memory holds: a segment of them at a time.

Lists are sorted, so that a query's keys of a segment stand together, and cut
into items of at most P keys. The items of a segment stand together too, up to
six to a list that is gathered at once, and each segment's table is loaded once
for a chunk of queries. Every item is attended to as if it were a query of its
own; results of a query's items are weighted by their log-sum-exp, or, gradients
of queries, added up. A query of N keys makes at most N / P + G - 1 items, where
G segments are touched.
"""
# T queries (a chunk), N selected, G segments, I items, J steps, M items of a
# query, P keys of an item, H heads, C latent width

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_plan as plans
from pallas_kernels.sparse_mla import tpu_rows as rows

# Most keys of an item, and most items of a list.
ITEM = 256
ITEMS = 6


class Cut(NamedTuple):
  """Where the items of a chunk of queries are.

  Attributes:
    plan: what the kernel visits.
    item_TM: the items of each query.
    used_TM: which of them exist.
  """

  plan: plans.Plan
  item_TM: jax.Array
  used_TM: jax.Array


def list_shape(selected, segments, most):
  """Returns (keys of an item, items of a list of at most `most` keys).

  A query wastes half an item in a segment. Items are halved where a segment
  has fewer keys of it than two.
  """
  item = ITEM if selected // segments >= 2 * ITEM else ITEM // 2
  return item, min(ITEMS, most // item)


def split(num_keys, limit):
  """Returns (segments, keys of each), the last with fewer.

  A segment that a query has keys of costs it half an item, and in causal order
  fewer queries reach the later ones: all but the last are full.
  """
  size = min(rows.round_up(num_keys, 8), limit // 8 * 8)
  return -(-num_keys // size), size


def segment_tables(latent_BSC, key_rope_BSR, segments, size):
  """Returns packed tables [B, G, X, L]."""

  def cut(array_BSX):
    missing = segments * size - array_BSX.shape[1]
    padded = jnp.pad(array_BSX, [(0, 0), (0, missing), (0, 0)])
    return padded.reshape(-1, size, array_BSX.shape[-1])

  table = rows.pack(cut(latent_BSC), cut(key_rope_BSR))
  return table.reshape(-1, segments, *table.shape[1:])


def cut_lists(indices_TN, segments, size, words, most_keys, is_sorted):
  """Cuts the lists of a chunk of queries into items of single segments.

  Args:
    indices_TN: as in the front.
    segments, size: how many segments of how many keys there are.
    words: rows of a key in the table.
    most_keys: of a list that is gathered at once.
    is_sorted: whether lists ascend and end in their -1.
  """
  queries, selected = indices_TN.shape
  item, items = list_shape(selected, segments, most_keys)
  end = segments * size
  indices_TN = indices_TN.astype(jnp.int32)
  sorted_TN = jnp.where(indices_TN < 0, end, indices_TN)
  if not is_sorted:
    sorted_TN = jnp.sort(sorted_TN, axis=-1)
  bounds = size * jnp.arange(segments + 1, dtype=sorted_TN.dtype)
  # One segment's bound at a time: all of them at once would be large.
  edge_TE = lax.map(lambda b: jnp.sum(sorted_TN < b, axis=-1), bounds).T
  number_TG = -(-jnp.diff(edge_TE) // item)
  a_step = 2 * items
  # None for a segment that no query has keys of: its table is not loaded.
  steps_G = -(-jnp.sum(number_TG, axis=0) // a_step)
  first_step_G = jnp.cumsum(steps_G) - steps_G
  before_TG = jnp.cumsum(number_TG, axis=0) - number_TG
  most = -(-selected // item) + segments - 1
  num_steps = -(-queries * most // a_step) + segments

  item_M = jnp.arange(most)
  ends_TG = jnp.cumsum(number_TG, axis=1)
  used_TM = item_M < ends_TG[:, -1:]
  segment_TM = jnp.sum(item_M[:, None] >= ends_TG[:, None], axis=-1)
  segment_TM = jnp.minimum(segment_TM, segments - 1)
  pick = lambda x_TG: jnp.take_along_axis(x_TG, segment_TM, axis=1)
  rank_TM = item_M - pick(ends_TG - number_TG)
  item_TM = a_step * first_step_G[segment_TM] + pick(before_TG) + rank_TM
  start_TM = pick(edge_TE[:, :-1]) + item * rank_TM
  place_TM = jnp.where(used_TM, item_TM, a_step * num_steps)
  to_items = lambda x_TM: (
    jnp.zeros(a_step * num_steps, jnp.int32)
    .at[place_TM]
    .set(x_TM.astype(jnp.int32), mode="drop")
  )
  query_TM = jnp.broadcast_to(jnp.arange(queries)[:, None], item_TM.shape)
  query_I, start_I = to_items(query_TM), to_items(start_TM)
  size_I = to_items(pick(edge_TE[:, 1:]) - start_TM)

  padded = jnp.pad(sorted_TN, [(0, 0), (0, item)], constant_values=end)
  list_IP = jax.vmap(
    lambda query, start: lax.dynamic_slice(padded, (query, start), (1, item))[0]
  )(query_I, start_I)
  step_J, live = jnp.arange(num_steps), jnp.sum(steps_G)
  # Steps with nothing to do stay at the last table that was loaded.
  busy_J = jnp.minimum(step_J, jnp.maximum(live - 1, 0))
  segment_J = jnp.sum(busy_J[:, None] >= first_step_G, axis=-1) - 1
  base_I = size * jnp.repeat(segment_J, a_step)
  listed_IP = jnp.arange(item) < size_I[:, None]
  list_IP = jnp.where(listed_IP, list_IP - base_I[:, None], size)
  offsets_IP = rows.FRONT + words * list_IP
  live_J = step_J < live
  first_J = step_J == first_step_G[segment_J]
  last_J = step_J == (first_step_G + steps_G - 1)[segment_J]
  flag_J = jnp.where(live_J, first_J + 2 * last_J, -1)
  meta_JX = jnp.concatenate(
    [segment_J[:, None], flag_J[:, None], query_I.reshape(num_steps, a_step)],
    axis=1,
  )
  plan = plans.Plan(
    num_tables=segments,
    num_steps=num_steps,
    queries=None,
    items=items,
    offsets=jnp.pad(
      offsets_IP.reshape(2 * num_steps, 1, items * item).astype(jnp.int32),
      [(0, 2), (0, 0), (0, 0)],
      constant_values=rows.FRONT,
    ),
    meta=meta_JX.reshape(-1).astype(jnp.int32),
  )
  return Cut(plan, jnp.where(used_TM, item_TM, 0), used_TM)


def merge(cut, out_IHC, lse_I1H):
  """Returns (out_THC in the dtype of out, lse_TH) of whole lists."""
  lse_TMH = lse_I1H[:, 0][cut.item_TM]
  lse_TMH = jnp.where(cut.used_TM[..., None], lse_TMH, -jnp.inf)
  top_T1H = jnp.max(lse_TMH, axis=1, keepdims=True)
  top_T1H = jnp.where(jnp.isneginf(top_T1H), 0.0, top_T1H)
  weight_TMH = jnp.exp(lse_TMH - top_T1H)
  sum_TH = jnp.sum(weight_TMH, axis=1)
  weight_TMH /= jnp.where(sum_TH == 0.0, 1.0, sum_TH)[:, None]
  out_THC = add_items(cut, out_IHC, weight_TMH)
  return out_THC.astype(out_IHC.dtype), top_T1H[:, 0] + jnp.log(sum_TH)


def add_items(cut, array_IHC, weight_TMH=None):
  """Returns float32 [T,H,C], the sum over each query's items."""

  def step(m, sum_THC):
    part_THC = array_IHC[cut.item_TM[:, m]].astype(jnp.float32)
    if weight_TMH is not None:
      part_THC *= weight_TMH[:, m, :, None]
    return sum_THC + jnp.where(cut.used_TM[:, m, None, None], part_THC, 0.0)

  queries, most = cut.item_TM.shape
  zeros = jnp.zeros((queries, *array_IHC.shape[1:]), jnp.float32)
  return lax.fori_loop(0, most, step, zeros)


def by_chunks(array_BTX, size, fill=0):
  """Returns [B, chunks, size or all of T, ...], padded with `fill`."""
  batch, queries = array_BTX.shape[:2]
  size = min(size, queries)
  if queries % size:
    more = [(0, 0), (0, -queries % size)] + [(0, 0)] * (array_BTX.ndim - 2)
    array_BTX = jnp.pad(array_BTX, more, constant_values=fill)
  return array_BTX.reshape(batch, -1, size, *array_BTX.shape[2:])


def from_chunks(array_BKTX, queries):
  """Undoes `by_chunks`."""
  batch, chunks, size = array_BKTX.shape[:3]
  flat = array_BKTX.reshape(batch, chunks * size, *array_BKTX.shape[3:])
  return flat[:, :queries]
