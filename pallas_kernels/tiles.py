"""Building blocks of the plain XLA forms, shaped for CPUs.

XLA does not vectorise a reduction along the minor axis on CPU, and one product
over all heads writes out [heads, T, S]. So rows are reduced by an elementwise
combination of slices, which it does vectorise, and heads go in groups.
"""
# B batch, T queries, C queries of a chunk, Z keys of a tile, I heads, N groups
# of heads, G heads of a group, K width

import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp

HEAD_GROUP = 8


def reduce_rows(terms, width, combine, reduce, slices=8):
  """Reduces rows of `width` keys to one value each.

  Args:
    terms: gives the columns start to stop, as in terms(start, stop).
    width: how many columns there are, a multiple of `slices`.
    combine: joins two arrays elementwise.
    reduce: the same operation along an axis, as in reduce(x, axis=-1).
    slices: how many slices are combined; more are faster and compile slower.
  """
  part = width // slices
  combined = functools.reduce(
    combine, [terms(i * part, (i + 1) * part) for i in range(slices)]
  )
  return reduce(combined, axis=-1)


def sum_rows(terms, width, slices=8):
  """Sums rows of `width` keys; see `reduce_rows`."""
  return reduce_rows(terms, width, operator.add, jnp.sum, slices)


def max_rows(terms, width):
  """Takes the maximum of rows of `width` keys; see `reduce_rows`."""
  return reduce_rows(terms, width, jnp.maximum, jnp.max)


def group_heads(x_CI):
  """Brings heads to the front in groups of at most 8: [C,I,...] -> [N,G,C,...].

  All groups have the same size, the largest divisor of I up to 8.
  """
  heads = x_CI.shape[1]
  size = max(n for n in range(1, HEAD_GROUP + 1) if heads % n == 0)
  x_IC = jnp.swapaxes(x_CI, 0, 1)
  return x_IC.reshape(heads // size, size, *x_IC.shape[1:])


def sum_groups(function, groups):
  """Sums function(group) over the leading axis of the arrays in `groups`."""
  count = jax.tree.leaves(groups)[0].shape[0]
  total = function(jax.tree.map(lambda x: x[0], groups))
  if count == 1:
    return total
  rest = jax.tree.map(lambda x: x[1:], groups)
  return lax.scan(lambda sum_, x: (sum_ + function(x), None), total, rest)[0]


def dots(query_GCK, key_ZK):
  """Multiplies a group's queries with keys that all share; float32 [G,C,Z]."""
  heads, chunk, width = query_GCK.shape
  flat = lax.dot_general(
    query_GCK.reshape(heads * chunk, width),
    key_ZK,
    (((1,), (1,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return flat.reshape(heads, chunk, -1)


def index_scores(query_NGCK, weight_NGC, key_ZK):
  """Returns the weighted sum over heads of relu(q . k), float32 [C,Z]."""

  def group(arrays):
    query_GCK, weight_GC = arrays
    dot_GCZ = dots(query_GCK, key_ZK)
    terms = [
      jnp.maximum(dot_CZ, 0.0) * weight_C[:, None]
      for dot_CZ, weight_C in zip(dot_GCZ, weight_GC, strict=True)
    ]
    return functools.reduce(operator.add, terms)

  return sum_groups(group, (query_NGCK, weight_NGC))


def window(x_BT, row, start, size):
  """Returns x[row, start : start + size]; None stays None."""
  if x_BT is None:
    return None
  starts = (row, start) + (0,) * (x_BT.ndim - 2)
  return lax.dynamic_slice(x_BT, starts, (1, size, *x_BT.shape[2:]))[0]


def pad(x_BT, size, value=0):
  """Pads axis 1 up to `size`; None stays None."""
  if x_BT is None:
    return None
  widths = [(0, 0)] * x_BT.ndim
  widths[1] = (0, size - x_BT.shape[1])
  return jnp.pad(x_BT, widths, constant_values=value)
