"""Attention over a cache in pages: what is read of them, and by whom.

No sequence's latents are copied out of the pages: index keys are scored, and
the selected rows fetched, where they lie.
"""

import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.model import attention as attention_lib
from dsv32_jax.model import cost_rule
from dsv32_jax.model import forms
from dsv32_jax.model import selection as selection_lib
from pallas_kernels import decode_scores
from pallas_kernels import index_select

# B sequences, T queries, S slots, N selected keys, P pages, Z slots of a page,
# C latent, R rotary width, I index heads, K index width, H heads

# Queries of a sequence up to which index keys are scored where they lie.
FEW_QUERIES = index_select.FEW_QUERIES


def select(held, index, sight, options, *, layer, replay=None):
  """Chooses each query's slots, as indices.

  Args:
    held: PagedLayerCache with the queries' own tokens in it.
    index: IndexInputs of the queries.
    sight: visibility of the queries, without segments.
    options: with a selector other than Dense().
    layer: int32 scalar, the layer's number.
    replay: a recorded selection, words or indices, or None.

  Returns:
    A Selection with indices_BTN.
  """
  few = index.query_BTIK.shape[1] <= FEW_QUERIES
  num_slots = held.table_BM.shape[1] * held.latent_PZC.shape[1]
  if (
    few
    and replay is None
    and isinstance(options.select, selection_lib.TopK)
    and not options.select.takes_all(num_slots)
  ):
    return _select_in_place(held, index, sight, options)
  return attention_lib.select(
    options,
    "gathered",
    index,
    held.index_keys(index.query_BTIK.dtype),
    sight,
    layer=layer,
    replay=replay,
  )


def _select_in_place(held, index, sight, options):
  """Scores the pages in use and no others; a query is a request of its own."""
  batch, queries = sight.slots_BT.shape
  kernels = cost_rule.choose_kernels(options, queries, index.query_BTIK.dtype)

  def each_query(array_BTX):
    return array_BTX.reshape(batch * queries, *array_BTX.shape[2:])

  score_XS = _scores(
    each_query(index.query_BTIK),
    each_query(index.weight_BTI),
    held.index_key_PZK,
    held.index_scale_PZ,
    jnp.repeat(held.table_BM, queries, axis=0),
    each_query(sight.slots_BT) + 1,
    queries,
    # On a GPU none that has run on one, nor any that takes every page.
    "xla" if kernels == "gpu" else kernels,
  )
  indices_BTN, invalid_BT = index_select.select_scored(
    score_XS.reshape(batch, queries, -1), sight.slots_BT, top_k=options.select.k
  )
  return selection_lib.Selection(None, indices_BTN, invalid_BT)


def _scores(
  query_XIK, weight_XI, key_PZK, scale_PZ, table_XM, lengths_X, queries, kernels
):
  """Index scores_XS; each device of a mesh scores the pages that it holds.

  What travels between devices is a number a slot, never a key.
  """
  axes = sharding.axes_of("pages", key_PZK.shape[0])

  def run(query_XIK, weight_XI, key_PZK, scale_PZ, table_XM, lengths_X):
    own_XM = table_XM - sharding.mesh_index(*axes) * key_PZK.shape[0]
    is_here_XM = (own_XM >= 0) & (own_XM < key_PZK.shape[0])
    score_XS = decode_scores.decode_scores(
      query_XIK,
      weight_XI,
      key_PZK,
      scale_PZ,
      jnp.where(is_here_XM, own_XM, 0),
      lengths_X,
      run=queries,
      implementation=kernels,
    )
    if axes:
      is_here_XS = jnp.repeat(is_here_XM, key_PZK.shape[1], axis=1)
      score_XS = jnp.where(is_here_XS, score_XS, 0.0)
      score_XS = sharding.mesh_sum(score_XS, *axes)
    return (score_XS,)

  whole = (None, None)
  (score_XS,) = sharding.shard_call(
    run,
    (query_XIK, weight_XI, key_PZK, scale_PZ, table_XM, lengths_X),
    (
      *((None, None, None), whole),
      *(("pages", None, None), ("pages", None)),
      *(whole, (None,)),
    ),
    (whole,),
  )
  return score_XS


def attend(
  held, query, chosen, sight, options, key_up_CHN, value_up_CHV, *, scale
):
  """Attends to the selected slots: values_BTHV.

  Args:
    held: PagedLayerCache.
    query: query_nope_BTHN and query_rope_BTHR.
    chosen: Selection with indices_BTN, slots of each sequence.
    sight: visibility of the queries.
    options: attention options.
    key_up_CHN: expansion of latents to keys.
    value_up_CHV: expansion of latents to values.
    scale: softmax scale.
  """
  batch, length = query[0].shape[:2]
  rows_BTN = held.rows(chosen.indices_BTN)
  ups = (key_up_CHN.astype(query[0].dtype), value_up_CHV.astype(query[0].dtype))
  run = _attend_on_mesh if sharding.on_mesh() else _attend_in_place
  values = run(held, query, rows_BTN, sight, options, ups, scale)
  return values.reshape(batch, length, *values.shape[2:])


def _attend_in_place(held, query, rows_BTN, sight, options, ups, scale):
  """All queries look into the same pages, as if they were one sequence."""
  batch, length, _ = rows_BTN.shape
  kernels = cost_rule.choose_kernels(options, length, query[0].dtype)
  if kernels.startswith("tpu"):
    # They want ascending rows; elsewhere the sum keeps the order of slots,
    # so that a result does not depend on which pages were free.
    num_rows = held.latent_PZC.shape[0] * held.latent_PZC.shape[1]
    rows_BTN = selection_lib.from_replay(
      rows_BTN, num_keys=num_rows, want_indices=rows_BTN.shape[-1]
    )

  def one_row(array_BTX):
    return array_BTX.reshape(1, batch * length, *array_BTX.shape[2:])

  keys = (
    pages.reshape(1, -1, pages.shape[-1])
    for pages in (held.latent_PZC, held.key_rope_PZR)
  )
  values_1XHV, _ = attention_lib.attend(
    options,
    "gathered",
    forms.Projected(*map(one_row, query), *keys, *ups),
    selection_lib.Selection(None, one_row(rows_BTN), None),
    selection_lib.Visibility(one_row(sight.slots_BT), None, None),
    None,
    None,
    scale=scale,
  )
  return values_1XHV


def _attend_on_mesh(held, query, rows_BTN, sight, options, ups, scale):
  """Each query gets its own rows, which come from the devices that hold them.

  To gather whole pages would take every device the memory of all.
  """
  batch, length, count = rows_BTN.shape
  rows_XN = rows_BTN.reshape(batch * length, count)

  def each_query(array_BTX):
    return array_BTX.reshape(batch * length, 1, *array_BTX.shape[2:])

  def fetch(pages):
    rows_SX = pages.reshape(-1, pages.shape[-1])
    return jnp.take(rows_SX, jnp.maximum(rows_XN, 0), axis=0, mode="clip")

  place_X1N = jnp.where(rows_XN < 0, -1, jnp.arange(count))[:, None]
  values_X1HV, _ = attention_lib.attend(
    options,
    "gathered",
    forms.Projected(
      *map(each_query, query),
      *map(fetch, (held.latent_PZC, held.key_rope_PZR)),
      *ups,
    ),
    selection_lib.Selection(None, place_X1N, None),
    selection_lib.Visibility(each_query(sight.slots_BT), None, None),
    None,
    None,
    scale=scale,
  )
  return values_X1HV
