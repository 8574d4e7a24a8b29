"""The second half of the TPU selection: thresholds, mask and log-sum-exps.

Works on the encoded scores of one query tile, int32 [rows,L] in VMEM with the
keys along sublanes and (group, query) along lanes; all state is one register
row [1,L], equal in all groups of a query.
1. `search` brackets the k-th best score of every query at once. A pass reads
   the tiles in sight and counts the keys at or above one point a query. It
   ends when each query has a point with exactly the wanted number of keys at
   or above it, or knows the value of its k-th key.
2. `_emit` reads the scores once more. In the block's (bit, word) order the
   number of earlier keys equal to the k-th value is a sum over registers and,
   once a block, a prefix sum over 8 sublanes (and over the groups): ties go to
   the lowest index with no further search. The same read packs the words and
   adds up both log-sum-exps, whose common maximum is known.

Memory: nothing beside the scores but registers.
"""
# L lanes (group, query), Z rows of a block

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels.index_select import order

LANES = 128
# Steps of the search of which two in three interpolate, and the most there are.
GUESSES = 16
MOST_STEPS = 43
# Keys of a block: 8 words, one a sublane.
BLOCK = 8 * bitmask.BITS
# Number of visible keys, least and greatest score when none was seen.
EMPTY_STATISTICS = (0, order.NAN, order.HIDDEN)
# The code of a score of minus infinity, the least of all scores.
MINUS_INFINITY = -(2**31) + 2**23 - 1


class _Cut(NamedTuple):
  """What is selected: keys > value, and the first `needed` keys == value.

  All keys == value are selected where there is no tie at the threshold. An
  invalid row counts as one with a tie, of which nothing is needed.
  """

  value_1L: jax.Array
  needed_1L: jax.Array
  tied_1L: jax.Array


class Bracket(NamedTuple):
  """Fewer than `wanted` keys are >= high, and at_low >= wanted are >= low.

  Attributes:
    step: how many times the scores were read.
    low_1L: the greatest code known to have enough keys at or above it.
    high_1L: the least code known to have too few.
    at_low_1L: how many keys are >= low.
    at_high_1L: how many keys are >= high.
  """

  step: jax.Array
  low_1L: jax.Array
  high_1L: jax.Array
  at_low_1L: jax.Array
  at_high_1L: jax.Array


def add_statistics(stats_38L, ordered_ZL):
  """Adds a block to the count, minimum and maximum of the visible keys."""
  ordered_X8L = ordered_ZL.reshape(-1, 8, ordered_ZL.shape[-1])
  seen_X8L = ordered_X8L > order.HIDDEN
  least_X8L = jnp.where(seen_X8L, ordered_X8L, order.NAN)
  return jnp.stack(
    [
      stats_38L[0] + jnp.sum(seen_X8L.astype(jnp.int32), axis=0),
      jnp.minimum(stats_38L[1], jnp.min(least_X8L, axis=0)),
      jnp.maximum(stats_38L[2], jnp.max(ordered_X8L, axis=0)),
    ]
  )


def group_of(lane, queries):
  """Returns the group of a lane; `queries` is a power of two."""
  return lane >> (queries.bit_length() - 1)


def over_groups(queries, combine, x):
  """Combines the lanes of all groups of each query; all get the result."""
  shift = LANES // 2
  while shift >= queries:
    x = combine(x, pltpu.roll(x, shift, axis=1))
    shift //= 2
  return x


def finish(sizes, seen, ordered_ref, seen_stats_ref, words_ref, stats_ref):
  """Selects from scores of `seen` blocks; writes words and statistics."""
  count_1L, least_1L, best_1L = (
    over_groups(sizes.queries, combine, reduce(x_8L, axis=0, keepdims=True))
    for combine, reduce, x_8L in (
      (jnp.add, jnp.sum, seen_stats_ref[0]),
      (jnp.minimum, jnp.min, seen_stats_ref[1]),
      (jnp.maximum, jnp.max, seen_stats_ref[2]),
    )
  )
  invalid_1L = best_1L == order.NAN
  wanted_1L = jnp.where(invalid_1L, 0, jnp.minimum(count_1L, sizes.top_k))
  state = search(
    sizes,
    lax.div(seen * BLOCK + sizes.tile - 1, sizes.tile),
    ordered_ref,
    wanted_1L,
    Bracket(jnp.int32(0), least_1L, best_1L + 1, count_1L, 0 * count_1L),
  )
  tied_1L = state.at_low_1L != wanted_1L
  needed_1L = jnp.where(tied_1L, wanted_1L - state.at_high_1L, order.NAN)
  cut = _Cut(
    value_1L=jnp.where(invalid_1L, order.NAN, state.low_1L),
    needed_1L=jnp.where(invalid_1L, 0, needed_1L),
    tied_1L=tied_1L | invalid_1L,
  )
  top_1L = order.decode(best_1L)
  top_1L = jnp.where(jnp.abs(top_1L) < jnp.inf, top_1L, 0.0)
  sums = _emit(sizes, seen, ordered_ref, words_ref, cut, top_1L)
  has_1L = (count_1L > 0) & ~invalid_1L
  lse_1L = [jnp.where(has_1L, jnp.log(x) + top_1L, -jnp.inf) for x in sums]
  row_8L = lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
  stats_8L = jnp.where(row_8L == 0, lse_1L[0], lse_1L[1])
  invalid_1L = invalid_1L.astype(jnp.float32)
  stats_ref[0, 0] = jnp.where(row_8L < 2, stats_8L, invalid_1L)


def search(sizes, num_tiles, ordered_ref, wanted_1L, state):
  """Narrows the brackets of all queries until every one is done.

  A query is done with exactly `wanted` keys at or above `low`, or with `low` as
  the value of its last wanted key: high = low + 1.
  """

  def unfinished(state):
    open_1L = state.high_1L - 1 != state.low_1L
    return (wanted_1L > 0) & open_1L & (state.at_low_1L != wanted_1L)

  def step(state):
    low_1L, high_1L = state.low_1L, state.high_1L
    point_1L = _point(state, wanted_1L)
    count_1L = _count_from(sizes, num_tiles, ordered_ref, point_1L)
    active_1L = unfinished(state)
    up_1L = active_1L & (count_1L >= wanted_1L)
    down_1L = active_1L & (count_1L < wanted_1L)
    return Bracket(
      step=state.step + 1,
      low_1L=jnp.where(up_1L, point_1L, low_1L),
      high_1L=jnp.where(down_1L, point_1L, high_1L),
      at_low_1L=jnp.where(up_1L, count_1L, state.at_low_1L),
      at_high_1L=jnp.where(down_1L, count_1L, state.at_high_1L),
    )

  def any_left(state):
    return jnp.max(unfinished(state).astype(jnp.int32)) > 0

  return lax.while_loop(any_left, step, state)


def _point(state, wanted_1L):
  """Returns where to count next, between low and high.

  Two steps of three interpolate, as if the keys within the bracket were evenly
  spread. They aim a little past the wanted count, at the farther end's side, by
  half the square root of the keys up to the nearer end: so that both ends move
  in. The third step halves the bracket, and so do all after the first 16: at
  most `MOST_STEPS` (11 guesses and 32 halvings), whatever the scores.
  """
  low_1L, high_1L = state.low_1L, state.high_1L
  # Half the width, which itself may take 32 bits.
  half_1L = lax.shift_right_logical(high_1L - low_1L, 1)
  wanted_1L = wanted_1L.astype(jnp.float32)
  at_low_1L = state.at_low_1L.astype(jnp.float32)
  above_1L = at_low_1L - wanted_1L
  below_1L = wanted_1L - state.at_high_1L.astype(jnp.float32)
  past_1L = 0.5 * jnp.sqrt(jnp.minimum(above_1L, below_1L) + 1.0)
  share_1L = jnp.where(
    above_1L > below_1L,
    above_1L - jnp.minimum(past_1L, 0.5 * above_1L),
    above_1L + jnp.minimum(past_1L, 0.5 * below_1L),
  ) / (above_1L + below_1L)
  guess_1L = half_1L.astype(jnp.float32) * jnp.minimum(share_1L, 0.999)
  guess_1L = low_1L + 2 * guess_1L.astype(jnp.int32)
  halve = (lax.rem(state.step, 3) == 2) | (state.step >= GUESSES)
  point_1L = jnp.where(halve, low_1L + half_1L, guess_1L)
  return jnp.minimum(jnp.maximum(point_1L, low_1L + 1), high_1L - 1)


def _count_from(sizes, num_tiles, ordered_ref, point_1L):
  """Counts the keys of each query that are >= point."""

  def body(tile, count_32L):
    start = pl.multiple_of(tile * sizes.tile, sizes.tile)
    at_least_PL = ordered_ref[pl.ds(start, sizes.tile), :] >= point_1L
    at_least_X32L = at_least_PL.astype(jnp.int32).reshape(-1, 32, LANES)
    return count_32L + jnp.sum(at_least_X32L, axis=0)

  count_32L = lax.fori_loop(
    0, num_tiles, body, jnp.zeros((32, LANES), jnp.int32)
  )
  count_1L = jnp.sum(count_32L, axis=0, keepdims=True)
  return over_groups(sizes.queries, jnp.add, count_1L)


def _emit(sizes, seen, ordered_ref, words_ref, cut, top_1L):
  """Writes all words; returns the sums of exp(score - top), all and selected.

  Without a tie at any query's threshold there are no ranks to count.
  """
  zeros_8L = jnp.zeros((8, LANES), jnp.float32)
  carry = jnp.zeros((1, LANES), jnp.int32), zeros_8L, zeros_8L

  def run(ties):
    def body(block, carry):
      ordered_ZL = ordered_ref[rows(block), :]
      words_8L, *carry = _block(sizes, ties, ordered_ZL, cut, top_1L, *carry)
      words_ref[0, 0, _words(block), :] = words_8L
      return tuple(carry)

    return lax.fori_loop(0, seen, body, carry)

  any_tie = jnp.max(cut.tied_1L.astype(jnp.int32)) > 0
  _, *sums = lax.cond(
    any_tie, functools.partial(run, True), functools.partial(run, False)
  )

  def clear(block, _):
    words_ref[0, 0, _words(block), :] = jnp.zeros((8, LANES), jnp.int32)

  lax.fori_loop(seen, words_ref.shape[2] // 8, clear, None)
  return [
    over_groups(sizes.queries, jnp.add, jnp.sum(x, axis=0, keepdims=True))
    for x in sums
  ]


def _block(
  sizes, ties, ordered_ZL, cut, top_1L, before_1L, all_8L, selected_8L
):
  """Returns the words of one block and what is carried to the next."""
  registers = [ordered_ZL[i : i + 8] for i in range(0, BLOCK, 8)]
  if ties:
    equal_8L = sum((x == cut.value_1L).astype(jnp.int32) for x in registers)
    rank_8L, total_1L = _ranks(sizes.queries, equal_8L)
    rank_8L = rank_8L + before_1L
    before_1L = before_1L + total_1L
  words_8L = jnp.zeros((8, LANES), jnp.int32)
  for bit, ordered_8L in enumerate(registers):
    if ties:
      equal = ordered_8L == cut.value_1L
      chosen = (ordered_8L > cut.value_1L) | (equal & (rank_8L < cut.needed_1L))
      rank_8L = rank_8L + equal.astype(jnp.int32)
    else:
      chosen = ordered_8L >= cut.value_1L
    flag = jnp.uint32(1 << bit).astype(jnp.int32)
    words_8L = words_8L | jnp.where(chosen, flag, 0)
    # A hidden key adds exp(-inf).
    score_8L = order.decode(jnp.maximum(ordered_8L, MINUS_INFINITY))
    power_8L = jnp.exp(score_8L - top_1L)
    all_8L = all_8L + power_8L
    selected_8L = selected_8L + jnp.where(chosen, power_8L, 0.0)
  return words_8L, before_1L, all_8L, selected_8L


def rows(block):
  """Returns the rows of one block."""
  return pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)


def _words(block):
  return pl.ds(pl.multiple_of(block * 8, 8), 8)


def _ranks(queries, count_8L):
  """Returns the exclusive prefix sum in the order of keys, and the total."""
  row_8L = lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
  lane_1L = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  group_1L = group_of(lane_1L, queries)
  upto_8L = count_8L
  for shift in (1, 2, 4):
    moved_8L = pltpu.roll(upto_8L, shift, axis=0)
    upto_8L = upto_8L + jnp.where(row_8L >= shift, moved_8L, 0)
  own_1L = jnp.sum(count_8L, axis=0, keepdims=True)
  before_1L = jnp.zeros_like(own_1L)
  for distance in range(1, LANES // queries):
    moved_1L = pltpu.roll(own_1L, distance * queries, axis=1)
    before_1L = before_1L + jnp.where(group_1L >= distance, moved_1L, 0)
  total_1L = over_groups(queries, jnp.add, own_1L)
  return upto_8L - count_8L + before_1L, total_1L
