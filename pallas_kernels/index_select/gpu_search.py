"""Finds the k best of each row of int32 keys on Hopper, in registers.

A block of four warpgroups takes a row, of which each thread keeps up to 64 keys
in registers: the row is read once. The bisection is that of `search`: a pass
counts the keys at or above a threshold, each warpgroup its own, and adds the
four counts up through shared memory. It stops as soon as exactly the wanted
number of keys is at or above a threshold, or the k-th key is known.
Ties are rare, and plain XLA breaks them: by a running count of the tied keys.
Memory of a block: 40 bytes of counts. Longer rows go to `search`.
"""
# C rows, P keys of a row

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.index_select import order
from pallas_kernels.index_select import search

# Warpgroups, keys of a thread's load, and most keys of a row.
PARTS, VECTOR = 4, 4
STEP = PARTS * VECTOR * 128
MAX_KEYS = 64 * PARTS * 128


def best(ordered_CP, top_k, *, interpret=False):
  """Returns the `search.Cut` that selects min(top_k, keys seen) of each row.

  Args:
    ordered_CP: int32 from `order.encode`, hidden keys `order.HIDDEN`.
    top_k: how many keys to select at most.
    interpret: what to give `plgpu.kernel` as `interpret`.

  A row with a NaN is invalid, and nothing of it is selected.
  """
  keys = ordered_CP.shape[1]
  if keys > MAX_KEYS:
    num_tiles = -(-keys // search.TILE)
    missing = num_tiles * search.TILE - keys
    padded_CP = jnp.pad(
      ordered_CP, [(0, 0), (0, missing)], constant_values=order.HIDDEN
    )
    return search.best(search.Block(padded_CP, jnp.int32(num_tiles)), top_k)
  padded_CP = jnp.pad(
    ordered_CP, [(0, 0), (0, -keys % STEP)], constant_values=order.HIDDEN
  )
  low_C, at_low_C, at_high_C, wanted_C, nan_C = _bisect(
    padded_CP, top_k, interpret
  )
  invalid_C = nan_C > 0
  tied_C = ~invalid_C & (at_low_C != wanted_C)
  end_C = lax.cond(
    jnp.any(tied_C),
    lambda: _break_ties(ordered_CP, low_C, wanted_C - at_high_C),
    lambda: jnp.zeros_like(low_C),
  )
  # Without a tie all keys at or above `low` are in: those above low - 1.
  value_C = jnp.where(tied_C, low_C, low_C - 1)
  value_C = jnp.where(invalid_C, order.NAN, value_C)
  return search.Cut(value_C, jnp.where(tied_C, end_C, 0), invalid_C)


def _break_ties(ordered_CP, value_C, wanted_C):
  """Returns where the first `wanted` keys equal to `value` end."""
  tied_CP = (ordered_CP == value_C[:, None]).astype(jnp.int32)
  before_CP = jnp.cumsum(tied_CP, axis=1) < wanted_C[:, None]
  return jnp.sum(before_CP, axis=1, dtype=jnp.int32) + 1


def _bisect(ordered_CP, top_k, interpret):
  rows = ordered_CP.shape[0]
  # A reduction inside a warpgroup needs some shared memory of the compiler's.
  parameters = gpu_tiles.parameters().replace(reduction_scratch_bytes=2048)
  return plgpu.kernel(
    functools.partial(_kernel, top_k),
    out_type=(jax.ShapeDtypeStruct((rows,), jnp.int32),) * 5,
    grid=(rows,),
    grid_names=("row",),
    num_threads=PARTS,
    thread_name="part",
    scratch_types=dict(
      counts=plgpu.SMEM((2, PARTS), jnp.int32),
      counted=plgpu.Barrier(num_arrivals=PARTS),
    ),
    compiler_params=parameters,
    interpret=interpret,
    kernel_name="index_bisect",
  )(ordered_CP)


def _kernel(
  top_k,
  ordered_CP,
  low_C,
  at_low_C,
  at_high_C,
  wanted_C,
  nan_C,
  *,
  counts,
  counted,
):
  """Bisects one row."""
  row, part = lax.axis_index("row"), lax.axis_index("part")
  own = ordered_CP.shape[1] // PARTS
  key_P = gpu_tiles.load(
    ordered_CP.at[row, pl.ds(part * own, own)],
    plgpu.Layout.WG_STRIDED((own,), vec_size=VECTOR),
  )

  def count_from(step, point):
    # Two rows of counts: one is read while the other is written.
    side = lax.rem(step, 2)
    counts[side, part] = jnp.sum(jnp.where(key_P >= point, 1, 0))
    plgpu.barrier_arrive(counted)
    plgpu.barrier_wait(counted)
    return sum(counts[side, i] for i in range(PARTS))

  lowest = jnp.int32(order.HIDDEN + 1)
  seen = count_from(jnp.int32(0), lowest)
  num_nan = count_from(jnp.int32(1), jnp.int32(order.NAN))
  wanted = jnp.minimum(seen, top_k)

  def unfinished(state):
    _, low, high, at_low, _ = state
    return (high - 1 > low) & (at_low != wanted) & (num_nan == 0)

  def halve(state):
    step, low, high, at_low, at_high = state
    middle = (low & high) + ((low ^ high) >> 1)
    count = count_from(step, middle)
    up = count >= wanted
    return (
      step + 1,
      jnp.where(up, middle, low),
      jnp.where(up, high, middle),
      jnp.where(up, count, at_low),
      jnp.where(up, at_high, count),
    )

  start = (jnp.int32(2), lowest, jnp.int32(order.NAN), seen, jnp.int32(0))
  _, low, _, at_low, at_high = lax.while_loop(unfinished, halve, start)

  @pl.when(part == 0)
  def _():
    low_C[row] = low
    at_low_C[row] = at_low
    at_high_C[row] = at_high
    wanted_C[row] = wanted
    nan_C[row] = num_nan
