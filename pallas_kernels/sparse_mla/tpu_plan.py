"""What the TPU kernels of gathered attention visit, and in which blocks."""
# B batch, T queries, S keys, N selected, I lists (two a grid step), X rows of a
# table, L lanes

import dataclasses

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_rows as rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a kernel's grid visits: in a step two lists, each of some items.

  Attributes:
    num_tables: how many tables of keys there are.
    num_steps: size of the grid.
    queries: of a batch entry, where an item is a query, its list whole; else
      None, and `meta` tells.
    items: how many items share a list, each with its own query.
    offsets: int32 [2 steps + 2, 1, N], first words of the listed keys.
    meta: int32 [steps * (2 items + 2)]: table, flags, queries; or one 0.
  """

  num_tables: int
  num_steps: int
  queries: int | None
  items: int
  offsets: jax.Array
  meta: jax.Array

  def chunk(self, most):
    """Returns how many keys, at most `most`, are multiplied at once.

    An item has a whole number of chunks, a list an even one.
    """
    size = self.offsets.shape[-1] // self.items
    unit = 2 if self.items % 2 else 1
    sizes = (512, 384, 256, 128, 64, 32, 16)
    return next(n for n in sizes if n <= most and size % (unit * n) == 0)

  def by_item(self, array_TX):
    """Returns the rows of a small array by query, flat over tables, by item."""
    if self.queries is None:
      meta_JX = self.meta.reshape(self.num_steps, -1)
      return array_TX[meta_JX[:, 2:].reshape(-1)]
    split = array_TX.reshape(self.num_tables, self.queries, *array_TX.shape[1:])
    more = [(0, 0), (0, self.queries % 2)] + [(0, 0)] * (array_TX.ndim - 1)
    return jnp.pad(split, more).reshape(-1, *array_TX.shape[1:])

  def table(self, step, meta_ref):
    """Returns the table of a step."""
    if self.queries is None:
      return meta_ref[self._meta(step)]
    return lax.div(step, self._steps_a_table())

  def query(self, item, step, meta_ref):
    """Returns the query of one of a step's items, of both lists."""
    if self.queries is None:
      return meta_ref[self._meta(step) + 2 + item]
    place = 2 * self._place(step) + item
    last = self.queries - 1
    return self.table(step, meta_ref) * self.queries + jnp.minimum(place, last)

  def is_live(self, step, meta_ref):
    """Returns whether the step has items."""
    return True if self.queries else meta_ref[self._meta(step) + 1] >= 0

  def is_first(self, step, meta_ref):
    """Returns whether the step is the first of its table."""
    if self.queries is None:
      return meta_ref[self._meta(step) + 1] & 1 == 1
    return self._place(step) == 0

  def is_last(self, step, meta_ref):
    """Returns whether the step is the last of its table."""
    if self.queries is None:
      return meta_ref[self._meta(step) + 1] & 2 == 2
    return self._place(step) == self._steps_a_table() - 1

  def _meta(self, step):
    return (2 * self.items + 2) * step

  def _place(self, step):
    return lax.rem(step, self._steps_a_table())

  def _steps_a_table(self):
    return self.num_steps // self.num_tables


def plan_queries(indices_BTN, num_keys, words):
  """Plans an item a query, for tables that hold all keys of a batch entry."""
  batch, queries, selected = indices_BTN.shape
  unit = rows.LANES if selected > 64 else 32
  more = [(0, 0), (0, queries % 2), (0, -selected % unit)]
  lists = jnp.pad(indices_BTN.astype(jnp.int32), more, constant_values=-1)
  lists = jnp.where(lists < 0, num_keys, lists)
  offsets = rows.FRONT + words * lists
  offsets = offsets.reshape(-1, 1, lists.shape[-1])
  return Plan(
    num_tables=batch,
    num_steps=offsets.shape[0] // 2,
    queries=queries,
    items=1,
    offsets=jnp.pad(
      offsets, [(0, 2), (0, 0), (0, 0)], constant_values=rows.FRONT
    ),
    meta=jnp.zeros(1, jnp.int32),
  )


def table_spec(plan, table_BXL):
  """Returns the block of a resident table: one buffer, a whole table."""
  return pl.BlockSpec(
    (None, *table_BXL.shape[1:]),
    lambda step, meta_ref: (plan.table(step, meta_ref), 0, 0),
    pipeline_mode=pl.Buffered(1),
  )


def query_specs(plan, shape):
  """Returns the blocks of a step's queries, of an array by query."""
  return [
    pl.BlockSpec(
      (None, *shape),
      lambda step, meta_ref, item=item: (
        plan.query(item, step, meta_ref),
        *(0 for _ in shape),
      ),
    )
    for item in range(2 * plan.items)
  ]
