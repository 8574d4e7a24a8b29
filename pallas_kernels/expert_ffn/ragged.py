"""The routed experts as grouped products over rows sorted by expert.

Counting puts the (token, slot) rows of an expert next to each other, rows of no
expert last; `jax.lax.ragged_dot` multiplies each group by its expert's matrix.
Nothing is sorted and nothing scattered but a permutation of integers: rows
travel by gathers, forward and backward, for a sort costs the TPU compiler
seconds and each scatter-add hides one. Memory: T*A rows of D and F.
"""
# T tokens, A experts a token, E experts, D model width, F expert width, N rows

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class _Plan(NamedTuple):
  """Where rows go; row n of the unsorted is slot n % A of token n // A."""

  place_TA: jax.Array  # of a row among the sorted ones
  order_N: jax.Array  # the unsorted row that is at a place
  valid_TA: jax.Array  # bool, whether the row has an expert here
  sizes_E: jax.Array


def grouped(rows_ND, weight_EDF, sizes_E):
  """Multiplies the rows of each group by its matrix: float32 [N,F].

  Rows past the last group have results that nothing is said of.
  """
  return lax.ragged_dot(
    rows_ND, weight_EDF, sizes_E, preferred_element_type=jnp.float32
  )


def expert_ffn(
  x_TD,
  experts_TA,
  weights_TA,
  gate_EDF,
  up_EDF,
  down_EFD,
  *,
  grouped=grouped,
):
  """Returns out_TD float32; see the front for what it is.

  `grouped` multiplies, as the function of that name here.
  """
  plan = _make_plan(experts_TA, gate_EDF.shape[0])
  x_ND = _dispatch(x_TD, plan)
  gate_NF = grouped(x_ND, gate_EDF, plan.sizes_E)
  up_NF = grouped(x_ND, up_EDF, plan.sizes_E)
  hidden_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_TD.dtype)
  out_ND = grouped(hidden_NF, down_EFD, plan.sizes_E)
  return _combine(out_ND, weights_TA.astype(jnp.float32), plan)


def _make_plan(experts_TA, experts):
  ids_N = experts_TA.reshape(-1)
  valid_N = (ids_N >= 0) & (ids_N < experts)
  ids_N = jnp.where(valid_N, ids_N, experts)
  groups = jnp.arange(experts + 1, dtype=ids_N.dtype)
  own_NE = (ids_N[:, None] == groups).astype(jnp.int32)
  count_NE = jnp.cumsum(own_NE, axis=0)
  sizes_E = count_NE[-1]
  start_E = jnp.cumsum(sizes_E) - sizes_E
  place_N = jnp.sum(own_NE * (start_E + count_NE - 1), axis=1)
  rows_N = jnp.arange(ids_N.size, dtype=jnp.int32)
  order_N = jnp.zeros_like(rows_N)
  order_N = order_N.at[place_N].set(rows_N, unique_indices=True)
  shape = experts_TA.shape
  return _Plan(
    place_N.reshape(shape), order_N, valid_N.reshape(shape), sizes_E[:-1]
  )


@jax.custom_vjp
def _dispatch(x_TD, plan):
  """Returns the rows [N,D] in the order of their experts."""
  return x_TD[plan.order_N // plan.place_TA.shape[1]]


def _dispatch_forward(x_TD, plan):
  return _dispatch(x_TD, plan), plan


def _dispatch_backward(plan, d_x_ND):
  ones_TA = jnp.ones(plan.place_TA.shape, jnp.float32)
  return _sum_rows(d_x_ND, ones_TA, plan).astype(d_x_ND.dtype), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(out_ND, weights_TA, plan):
  """Returns each token's weighted sum of its rows, float32."""
  return _sum_rows(out_ND, weights_TA, plan)


def _combine_forward(out_ND, weights_TA, plan):
  return _combine(out_ND, weights_TA, plan), (out_ND, weights_TA, plan)


def _combine_backward(saved, d_out_TD):
  out_ND, weights_TA, plan = saved
  per_token = weights_TA.shape[1]
  weights_TA = jnp.where(plan.valid_TA, weights_TA, 0.0)
  weights_N = weights_TA.reshape(-1)[plan.order_N]
  d_out_ND = weights_N[:, None] * d_out_TD[plan.order_N // per_token]
  d_weights = [
    jnp.sum(_rows(out_ND, plan, slot) * d_out_TD, axis=1)
    for slot in range(per_token)
  ]
  return d_out_ND, jnp.stack(d_weights, axis=1), None


_combine.defvjp(_combine_forward, _combine_backward)


def _sum_rows(rows_ND, weights_TA, plan):
  """Returns sum_a weight[t,a] row[t,a], float32, one slot after the other."""
  total_TD = 0.0
  for slot in range(weights_TA.shape[1]):
    total_TD += weights_TA[:, slot, None] * _rows(rows_ND, plan, slot)
  return total_TD


def _rows(rows_ND, plan, slot):
  """Returns a slot's row of each token, 0 where it has no expert here.

  Such rows belong to no group: what a product puts there is unsaid.
  """
  row_TD = rows_ND[plan.place_TA[:, slot]].astype(jnp.float32)
  return jnp.where(plan.valid_TA[:, slot, None], row_TD, 0.0)
