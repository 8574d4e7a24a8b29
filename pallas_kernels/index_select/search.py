"""Finds the k best of each row of int32 keys by bisection, shaped for CPUs.

A pass counts the keys at or above one threshold a row (`_count_from`). It reads
the first `level + 1` of at most `MAX_LEVELS` equal parts of the rows: a width
must be static to be fast, so `lax.switch` picks among one branch a level. The
bisection stops as soon as every row has a threshold with exactly the wanted
number of keys at or above it, or knows the value of its k-th key. Only rows of
the second kind hold ties, which a bisection over the keys' indices breaks.
"""
# C rows, P keys of a row, Z keys of a tile

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.index_select import order

MAX_LEVELS = 8
TILE = 256


class Block(NamedTuple):
  """Rows of keys, of which those from `num_tiles` tiles of 256 on are unset."""

  ordered_CP: jax.Array
  num_tiles: jax.Array


class Cut(NamedTuple):
  """What is selected: keys > value, and keys == value below index `end`."""

  value_C: jax.Array
  end_C: jax.Array
  invalid_C: jax.Array

  def holds(self, ordered_CZ, index_Z):
    """Returns which keys are selected, bool [C,Z]."""
    value_C1, end_C1 = self.value_C[:, None], self.end_C[:, None]
    tied_CZ = (ordered_CZ == value_C1) & (index_Z < end_C1)
    return (ordered_CZ > value_C1) | tied_CZ


class _State(NamedTuple):
  """Fewer than `wanted` keys are >= high, and at_low >= wanted are >= low."""

  step: jax.Array
  low_C: jax.Array
  high_C: jax.Array
  at_low_C: jax.Array
  at_high_C: jax.Array
  wanted_C: jax.Array
  invalid_C: jax.Array


def best(block, top_k):
  """Returns the `Cut` that selects min(top_k, keys seen) keys of each row.

  A row with a NaN is invalid, and nothing of it is selected.
  """
  rows_C = jnp.zeros_like(block.ordered_CP[:, 0])
  state = _State(
    step=jnp.int32(0),
    low_C=rows_C + (order.HIDDEN + 1),
    high_C=rows_C + order.NAN,
    at_low_C=rows_C,
    at_high_C=rows_C,
    wanted_C=rows_C,
    invalid_C=rows_C > 0,
  )
  state = lax.while_loop(
    lambda state: (state.step < 2) | jnp.any(_unfinished(state)),
    lambda state: _step(block, top_k, state),
    state,
  )
  tied_C = ~state.invalid_C & (state.at_low_C != state.wanted_C)
  end_C = lax.cond(
    jnp.any(tied_C),
    lambda: _break_ties(block, state.low_C, state.wanted_C - state.at_high_C),
    lambda: rows_C,
  )
  # Without a tie all keys at or above `low` are in: those above low - 1.
  value_C = jnp.where(tied_C, state.low_C, state.low_C - 1)
  value_C = jnp.where(state.invalid_C, order.NAN, value_C)
  return Cut(value_C, jnp.where(tied_C, end_C, 0), state.invalid_C)


def fold(block, elementwise, combine, reduce, initial_C):
  """Reduces elementwise(keys [C,Z], indices [Z]) over all keys that are set."""

  def body(tile, total_C):
    start = tile * TILE
    ordered_CZ = lax.dynamic_slice_in_dim(block.ordered_CP, start, TILE, axis=1)
    own_C = tiles.reduce_rows(
      lambda i, j: elementwise(ordered_CZ[:, i:j], start + jnp.arange(i, j)),
      TILE,
      combine,
      reduce,
    )
    return combine(total_C, own_C)

  return lax.fori_loop(0, block.num_tiles, body, initial_C)


def _unfinished(state):
  open_C = state.high_C - 1 > state.low_C
  return ~state.invalid_C & open_C & (state.at_low_C != state.wanted_C)


def _step(block, top_k, state):
  """Halves the bracket; the first two steps count the seen and the NaN."""
  low_C, high_C = state.low_C, state.high_C
  middle_C = (low_C & high_C) + ((low_C ^ high_C) >> 1)
  first, second = state.step == 0, state.step == 1
  point_C = jnp.where(first, low_C, jnp.where(second, high_C, middle_C))
  count_C = _count_from(block, point_C)
  wanted_C = jnp.where(first, jnp.minimum(count_C, top_k), state.wanted_C)
  active_C = _unfinished(state) & (state.step > 1)
  up_C = first | (active_C & (count_C >= wanted_C))
  down_C = active_C & (count_C < wanted_C)
  return _State(
    step=state.step + 1,
    low_C=jnp.where(up_C, point_C, low_C),
    high_C=jnp.where(down_C, point_C, high_C),
    at_low_C=jnp.where(up_C, count_C, state.at_low_C),
    at_high_C=jnp.where(down_C, count_C, state.at_high_C),
    wanted_C=wanted_C,
    invalid_C=state.invalid_C | (second & (count_C > 0)),
  )


def _count_from(block, point_C):
  """Counts the keys of each row that are >= point."""
  num_tiles = block.ordered_CP.shape[1] // TILE
  tiles_a_level = -(-num_tiles // MAX_LEVELS)
  levels = -(-num_tiles // tiles_a_level)

  def branch(width, ordered_CP, point_C):
    return tiles.sum_rows(
      lambda i, j: (ordered_CP[:, i:j] >= point_C[:, None]).astype(jnp.int32),
      width,
      slices=16,
    )

  sizes = [min(i * tiles_a_level, num_tiles) for i in range(1, levels + 1)]
  branches = [functools.partial(branch, size * TILE) for size in sizes]
  level = (block.num_tiles - 1) // tiles_a_level
  return lax.switch(level, branches, block.ordered_CP, point_C)


def _break_ties(block, value_C, needed_C):
  """Returns the least index below which `needed` keys equal their value."""
  size = block.ordered_CP.shape[1]

  def body(_, bounds):
    low_C, high_C = bounds
    middle_C = (low_C + high_C) // 2
    found_C = fold(
      block,
      lambda x_CZ, index_Z: (
        (x_CZ == value_C[:, None]) & (index_Z < middle_C[:, None])
      ).astype(jnp.int32),
      jnp.add,
      jnp.sum,
      jnp.zeros_like(value_C),
    )
    enough_C = found_C >= needed_C
    return (
      jnp.where(enough_C, low_C, middle_C + 1),
      jnp.where(enough_C, middle_C, high_C),
    )

  bounds = jnp.zeros_like(value_C), jnp.full_like(value_C, size)
  return lax.fori_loop(0, size.bit_length(), body, bounds)[1]
