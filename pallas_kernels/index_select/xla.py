"""Scores and exact selection in plain XLA, shaped for CPUs.

Queries go in chunks of at most 64, so that a chunk's scores stay in the cache:
- Scores: a loop over key tiles up to the chunk's last visible key (a dynamic
  trip count). A tile is one matrix product over all heads of a group, then one
  fused pass that applies ReLU, weights and the head sum, and writes the score as
  an int32 that sorts like the float (`_ordered`); keys that a query may not see
  get the lowest int32.
- Selection: bisection for the k-th largest int32 of each row. A pass counts the
  keys at or above one threshold a row. It stops when every row has a threshold
  with exactly k keys at or above it, or knows its k-th value exactly; only rows
  of the second kind have ties, which a bisection over key indices breaks.

XLA does not vectorise a reduction along the minor axis on CPU. So a reduction is
written as an elementwise combination of 32 slices of the row, which it does
vectorise, followed by a reduction of what is left (`_combine`). Its width is
static: `lax.switch` picks among 16 widths the first that covers the visible keys.

Memory a step: [64, S] int32, and [G * 64, tile] floats for G heads of a group.
"""
# B batch, T queries, S keys, I index heads, K index width, C queries of a chunk,
# R rows, P padded keys, W words of 32 keys, Z keys of a tile, G heads of a group

import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask

CHUNK = 64
SLICES = 32
TILE = 512
MAX_LEVELS = 16
HEAD_GROUP = 8
FEW_QUERIES = 8
HIDDEN = -(2**31)
NAN = 2**31 - 1
INFINITY = 0x7F800000


def select(
  query_BTIK,
  key_BSK,
  weight_BTI,
  slots_BT,
  query_segments_BT,
  key_segments_BS,
  key_scale_BS,
  *,
  top_k,
  want_mask,
  want_indices,
):
  """Returns the fields of `Selected` in order; see the front."""
  batch, queries, heads, width = query_BTIK.shape
  num_keys = key_BSK.shape[1]
  tile = TILE * -(-num_keys // (TILE * MAX_LEVELS))
  padded_keys = tile * -(-num_keys // tile)
  chunk = min(CHUNK, queries)
  chunks = -(-queries // chunk)
  pad_keys = functools.partial(_pad, axis=1, size=padded_keys)
  key_BPK = pad_keys(key_BSK.astype(jnp.float32))
  key_scale_BP = None if key_scale_BS is None else pad_keys(key_scale_BS)
  segments_BP = None if key_segments_BS is None else pad_keys(key_segments_BS)
  pad_queries = functools.partial(_pad, axis=1, size=chunks * chunk)
  query_BTIK = pad_queries(query_BTIK.astype(jnp.float32))
  weight_BTI = pad_queries(weight_BTI.astype(jnp.float32))
  slots_BT = pad_queries(jnp.minimum(slots_BT, num_keys - 1), value=-1)
  if query_segments_BT is not None:
    query_segments_BT = pad_queries(query_segments_BT)

  def body(ordered_CP, step):
    row, start = step // chunks, (step % chunks) * chunk
    take = lambda x: None if x is None else _window(x, row, start, chunk)
    whole = lambda x: None if x is None else x[row]
    ordered_CP = _scores(
      ordered_CP,
      take(query_BTIK),
      whole(key_BPK),
      take(weight_BTI),
      take(slots_BT),
      take(query_segments_BT),
      whole(segments_BP),
      whole(key_scale_BP),
      tile,
    )
    level = jnp.maximum(jnp.max(take(slots_BT)), 0) // tile
    chosen = _choose(ordered_CP, level, tile, top_k)
    return ordered_CP, _outputs(
      ordered_CP, *chosen, level, tile, num_keys, top_k, want_mask, want_indices
    )

  ordered_CP = jnp.full((chunk, padded_keys), HIDDEN, jnp.int32)
  _, outputs = lax.scan(body, ordered_CP, jnp.arange(batch * chunks))
  merge = lambda x: x.reshape(batch, chunks * chunk, *x.shape[2:])[:, :queries]
  return jax.tree.map(merge, outputs)


def _scores(
  ordered_CP,
  query_CIK,
  key_PK,
  weight_CI,
  slots_C,
  query_segments_C,
  key_segments_P,
  key_scale_P,
  tile,
):
  """Fills ordered_CP up to the last visible key, in whole tiles."""
  groups = _head_groups(query_CIK, weight_CI)

  def body(index, ordered_CP):
    start = index * tile
    key_ZK = lax.dynamic_slice_in_dim(key_PK, start, tile)
    score_CZ = 0.0
    for query_GCK, weight_GC in groups:
      score_CZ = score_CZ + _group_scores(query_GCK, key_ZK, weight_GC)
    if key_scale_P is not None:
      score_CZ = score_CZ * lax.dynamic_slice_in_dim(key_scale_P, start, tile)
    allowed_CZ = start + jnp.arange(tile) <= slots_C[:, None]
    if query_segments_C is not None:
      segments_Z = lax.dynamic_slice_in_dim(key_segments_P, start, tile)
      allowed_CZ &= query_segments_C[:, None] == segments_Z
    ordered_CZ = jnp.where(allowed_CZ, _ordered(score_CZ), HIDDEN)
    return lax.dynamic_update_slice(ordered_CP, ordered_CZ, (0, start))

  tiles = jnp.maximum(jnp.max(slots_C), 0) // tile + 1
  return lax.fori_loop(0, tiles, body, ordered_CP)


def _head_groups(query_CIK, weight_CI):
  """Splits the heads into groups of at most 8: [(query_GCK, weight_GC)]."""
  heads = query_CIK.shape[1]
  query_ICK = jnp.swapaxes(query_CIK, 0, 1)
  weight_IC = weight_CI.T
  return [
    (query_ICK[i : i + HEAD_GROUP], weight_IC[i : i + HEAD_GROUP])
    for i in range(0, heads, HEAD_GROUP)
  ]


def _group_scores(query_GCK, key_ZK, weight_GC):
  """Returns the weighted sum over heads of relu(q . k), [C,Z]."""
  heads, chunk, width = query_GCK.shape
  dot_GCZ = lax.dot_general(
    query_GCK.reshape(heads * chunk, width),
    key_ZK,
    (((1,), (1,)), ((), ())),
    precision=lax.Precision.HIGHEST,
  ).reshape(heads, chunk, -1)
  terms = [
    jnp.maximum(dot_GCZ[i], 0.0) * weight_GC[i][:, None] for i in range(heads)
  ]
  return functools.reduce(operator.add, terms)


def _ordered(score):
  """Maps float32 to int32 of the same order; NaN is the highest, -0.0 is 0.0."""
  bits = lax.bitcast_convert_type(score, jnp.int32)
  ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
  ordered = jnp.where(score == 0.0, 0, ordered)
  return jnp.where(jnp.isnan(score), NAN, ordered)


def _unordered(ordered):
  """Inverts `_ordered` for all but NaN."""
  bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
  return lax.bitcast_convert_type(bits, jnp.float32)


def _combine(ordered_CP, level, tile, elementwise, combine, reduce, *rows):
  """Reduces elementwise(keys, index, *rows) over the first level + 1 tiles.

  `combine` joins two arrays elementwise, `reduce` an array along its last axis.
  `rows` are [C] and reach `elementwise` as [C,1], with the operands as arrays.
  """

  def branch(width, ordered_CP, *rows):
    part = width // SLICES
    columns = [row[:, None] for row in rows]
    terms = [
      elementwise(
        ordered_CP[:, i * part : (i + 1) * part],
        jnp.arange(i * part, (i + 1) * part, dtype=jnp.int32),
        *columns,
      )
      for i in range(SLICES)
    ]
    return reduce(functools.reduce(combine, terms), axis=-1)

  widths = range(tile, ordered_CP.shape[1] + 1, tile)
  branches = [functools.partial(branch, width) for width in widths]
  return lax.switch(level, branches, ordered_CP, *rows)


def _count(ordered_CP, level, tile, predicate, *rows):
  """Counts the keys of each row for which predicate(keys, index, *rows)."""
  elementwise = lambda *x: predicate(*x).astype(jnp.int32)
  return _combine(
    ordered_CP, level, tile, elementwise, operator.add, jnp.sum, *rows
  )


def _choose(ordered_CP, level, tile, top_k):
  """Finds each row's selection: keys > value, or == value below index `end`.

  Returns value_C, end_C, best_C (the highest key) and invalid_C.
  """
  best_C = _combine(
    ordered_CP, level, tile, lambda x, _: x, jnp.maximum, jnp.max
  )
  invalid_C = best_C == NAN
  count = functools.partial(_count, ordered_CP, level, tile)
  seen_C = count(lambda x, _: x > HIDDEN)
  lowest = jnp.full_like(best_C, HIDDEN + 1)
  wanted_C = jnp.where(invalid_C, 0, jnp.minimum(seen_C, top_k))
  # Invariant: at least `wanted` keys are >= low, fewer are >= high.
  high_C = jnp.where(invalid_C, NAN, best_C + 1)
  state = (jnp.where(wanted_C == 0, high_C, lowest), high_C)
  state += (jnp.where(wanted_C == 0, 0, seen_C), jnp.zeros_like(best_C))

  def unfinished(state):
    low_C, high_C, count_low_C, _ = state
    return (count_low_C != wanted_C) & (high_C - 1 > low_C)

  def body(state):
    low_C, high_C, count_low_C, count_high_C = state
    middle_C = (low_C & high_C) + ((low_C ^ high_C) >> 1)
    count_C = count(lambda x, _, middle: x >= middle, middle_C)
    active_C = unfinished(state)
    up_C = active_C & (count_C >= wanted_C)
    down_C = active_C & (count_C < wanted_C)
    return (
      jnp.where(up_C, middle_C, low_C),
      jnp.where(down_C, middle_C, high_C),
      jnp.where(up_C, count_C, count_low_C),
      jnp.where(down_C, count_C, count_high_C),
    )

  state = lax.while_loop(lambda x: jnp.any(unfinished(x)), body, state)
  low_C, _, count_low_C, count_high_C = state
  tied_C = count_low_C != wanted_C
  end_C = lax.cond(
    jnp.any(tied_C),
    lambda: _break_ties(ordered_CP, count, low_C, wanted_C - count_high_C),
    lambda: jnp.zeros_like(low_C),
  )
  # With no tie everything at or above `low` is in: that is > low - 1.
  value_C = jnp.where(tied_C, low_C, low_C - 1)
  value_C = jnp.where(wanted_C == 0, NAN, value_C)
  return value_C, jnp.where(tied_C, end_C, 0), best_C, invalid_C


def _break_ties(ordered_CP, count, value_C, needed_C):
  """Returns the first index below which `needed` keys equal their value."""
  low_C = jnp.zeros_like(value_C)
  high_C = jnp.full_like(value_C, ordered_CP.shape[1])

  def body(_, bounds):
    low_C, high_C = bounds
    middle_C = (low_C + high_C) // 2
    found_C = count(
      lambda x, index, value, middle: (x == value) & (index < middle),
      value_C,
      middle_C,
    )
    enough_C = found_C >= needed_C
    return (
      jnp.where(enough_C, low_C, middle_C + 1),
      jnp.where(enough_C, middle_C, high_C),
    )

  steps = ordered_CP.shape[1].bit_length()
  return lax.fori_loop(0, steps, body, (low_C, high_C))[1]


def _is_selected(ordered, index, value, end):
  return (ordered > value) | ((ordered == value) & (index < end))


def _outputs(
  ordered_CP,
  value_C,
  end_C,
  best_C,
  invalid_C,
  level,
  tile,
  num_keys,
  top_k,
  want_mask,
  want_indices,
):
  """Returns the fields of `Selected` for one chunk."""
  chunk, padded_keys = ordered_CP.shape
  mask_CW = indices_CN = None
  if want_mask or want_indices:
    index_P = jnp.arange(padded_keys, dtype=jnp.int32)
    seen_CP = index_P < (level + 1) * tile
    mask_CP = _is_selected(
      ordered_CP, index_P, value_C[:, None], end_C[:, None]
    )
    words = bitmask.num_words(num_keys)
    mask_CW = bitmask.pack(mask_CP & seen_CP)[:, :words]
  if want_indices:
    indices_CN = bitmask.to_indices(mask_CW, top_k, num_keys)
  top_C = _unordered(best_C)
  top_C = jnp.where(jnp.isfinite(top_C), top_C, 0.0)
  unseen_C = invalid_C | (best_C == HIDDEN)
  top_C = jnp.where(unseen_C, 0.0, top_C)

  def log_sum(value_C, end_C):
    sum_C = _combine(
      ordered_CP,
      level,
      tile,
      lambda x, index, value, end, top: jnp.where(
        _is_selected(x, index, value, end), jnp.exp(_unordered(x) - top), 0.0
      ),
      operator.add,
      jnp.sum,
      value_C,
      end_C,
      top_C,
    )
    return jnp.where(unseen_C, -jnp.inf, jnp.log(sum_C) + top_C)

  everything = jnp.full_like(value_C, HIDDEN)
  return (
    mask_CW if want_mask else None,
    indices_CN,
    log_sum(everything, jnp.zeros_like(end_C)),
    log_sum(value_C, end_C),
    invalid_C,
  )


def _window(x_BT, row, start, size):
  """Returns x[row, start : start + size]."""
  starts = (row, start) + (0,) * (x_BT.ndim - 2)
  return lax.dynamic_slice(x_BT, starts, (1, size, *x_BT.shape[2:]))[0]


def _pad(x, *, axis, size, value=0):
  """Pads an axis up to `size`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value)
