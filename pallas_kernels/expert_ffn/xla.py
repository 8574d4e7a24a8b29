"""The routed experts in plain XLA for CPU: one block of rows at a time.

XLA's CPU `ragged_dot` multiplies every row by every expert. Here the rows, one
for each token and slot, are given places, expert after expert, each expert's
first row on a block boundary; a running count of the one-hot experts finds them
without a sort. A loop over as many blocks as the routing fills takes a block's
tokens and its one expert's weights, and adds the results to the tokens. So
uneven routing costs nothing but padding, at most one part-filled block an
expert. Backward does the same, recomputing the hidden rows.

Memory beyond inputs and outputs: a one-hot count of T*A by E int32, a block's
rows, one expert's weights, and in backward the float32 gradients.
"""
# T tokens, A experts a token, E experts, D model width, F expert width, N = T*A
# rows as given, P places in blocks, K blocks, R rows of a block

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class _Plan(NamedTuple):
  """The rows in their places: blocks of one expert each."""

  row_P: jax.Array  # N where the place is empty
  expert_K: jax.Array
  num_blocks: jax.Array


class _Hidden(NamedTuple):
  """The hidden layer of one block, float32 but for `hidden`."""

  gate_RF: jax.Array
  up_RF: jax.Array
  hidden_RF: jax.Array


@jax.custom_vjp
def expert_ffn(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD):
  """Returns out_TD float32; see the front for what it is."""
  block = _block_size(experts_TA, gate_EDF)
  plan = _plan(experts_TA, gate_EDF.shape[0], block)

  weights_N = weights_TA.astype(jnp.float32).reshape(-1)

  def step(index, out_TD):
    row_R = _block(plan.row_P, index, block)
    expert = plan.expert_K[index]
    x_RD = _tokens(x_TD, row_R, experts_TA)
    hidden = _hidden(x_RD, gate_EDF[expert], up_EDF[expert])
    out_RD = _dot(hidden.hidden_RF, down_EFD[expert])
    out_RD *= _take(weights_N, row_R)[:, None]
    return _add_tokens(out_TD, row_R, experts_TA, out_RD)

  out_TD = jnp.zeros(x_TD.shape, jnp.float32)
  return lax.fori_loop(0, plan.num_blocks, step, out_TD)


def _forward(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD):
  inputs = (x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD)
  return expert_ffn(*inputs), inputs


def _backward(inputs, d_out_TD):
  x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD = inputs
  block = _block_size(experts_TA, gate_EDF)
  plan = _plan(experts_TA, gate_EDF.shape[0], block)
  weights_N = weights_TA.astype(jnp.float32).reshape(-1)

  def step(index, totals):
    d_x_TD, d_weights_N, d_gate_EDF, d_up_EDF, d_down_EFD = totals
    row_R = _block(plan.row_P, index, block)
    expert = plan.expert_K[index]
    gate_DF, up_DF = gate_EDF[expert], up_EDF[expert]
    x_RD = _tokens(x_TD, row_R, experts_TA)
    hidden = _hidden(x_RD, gate_DF, up_DF)
    hidden_RF = hidden.hidden_RF.astype(jnp.float32)
    weight_R1 = _take(weights_N, row_R)[:, None]
    d_out_RD = _tokens(d_out_TD, row_R, experts_TA)
    # Before the weight, so that its own gradient needs no second product.
    d_unweighted_RF = _dot(d_out_RD, down_EFD[expert].T)
    d_weight_R = jnp.sum(d_unweighted_RF * hidden_RF, axis=-1)
    d_gate_RF, d_up_RF = _d_hidden(hidden, weight_R1 * d_unweighted_RF)
    d_x_RD = _dot(d_gate_RF, gate_DF.T) + _dot(d_up_RF, up_DF.T)
    return (
      _add_tokens(d_x_TD, row_R, experts_TA, d_x_RD),
      d_weights_N.at[row_R].set(d_weight_R, mode="drop"),
      _add(d_gate_EDF, expert, _dot(x_RD.T, d_gate_RF)),
      _add(d_up_EDF, expert, _dot(x_RD.T, d_up_RF)),
      _add(d_down_EFD, expert, _dot(hidden_RF.T, weight_R1 * d_out_RD)),
    )

  totals = tuple(
    jnp.zeros(array.shape, jnp.float32)
    for array in (x_TD, weights_N, gate_EDF, up_EDF, down_EFD)
  )
  totals = lax.fori_loop(0, plan.num_blocks, step, totals)
  d_x_TD, d_weights_N, *d_matrices = totals
  d_weights_TA = d_weights_N.reshape(weights_TA.shape)
  return (
    d_x_TD.astype(x_TD.dtype),
    None,
    d_weights_TA.astype(weights_TA.dtype),
    *(d.astype(w.dtype) for d, w in zip(d_matrices, inputs[3:])),
  )


expert_ffn.defvjp(_forward, _backward)


def _block_size(experts_TA, gate_EDF):
  """Returns rows of a block, by the rows that an expert gets on average.

  A block has a cost of its own, about that of 40 rows, and half a block an
  expert is padding: their sum is least near nine times the root of the average.
  """
  rows, experts = experts_TA.size, gate_EDF.shape[0]
  if 2 * rows <= experts:
    return 1
  wanted = 9.0 * math.sqrt(rows / experts)
  return min(512, max(8, 1 << round(math.log2(wanted))))


def _plan(experts_TA, num_experts, block):
  """Places each row: after its expert's earlier rows, in that one's blocks."""
  if block == 1:
    return _plan_single(experts_TA, num_experts)
  flat_N = experts_TA.reshape(-1)
  rows = flat_N.shape[0]
  chosen_NE = flat_N[:, None] == jnp.arange(num_experts)
  count_NE = jnp.cumsum(chosen_NE.astype(jnp.int32), axis=0)
  blocks_E = -(-count_NE[-1] // block)
  end_E = jnp.cumsum(blocks_E)
  first_E = (end_E - blocks_E) * block
  places = (rows // block + num_experts) * block
  place_N = jnp.sum(jnp.where(chosen_NE, first_E + count_NE - 1, 0), axis=-1)
  place_N = jnp.where(jnp.any(chosen_NE, axis=-1), place_N, places)
  row_P = jnp.full((places,), rows, jnp.int32)
  row_P = row_P.at[place_N].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
  block_K1 = jnp.arange(places // block)[:, None]
  expert_K = jnp.sum(block_K1 >= end_E, axis=-1, dtype=jnp.int32)
  return _Plan(
    row_P=row_P,
    expert_K=jnp.minimum(expert_K, num_experts - 1),
    num_blocks=end_E[-1],
  )


def _plan_single(experts_TA, num_experts):
  """Places a few rows as they come: hardly two have one expert."""
  rows = experts_TA.size
  ours_TA = (experts_TA >= 0) & (experts_TA < num_experts)
  row_N = jnp.arange(rows, dtype=jnp.int32)
  return _Plan(
    row_P=jnp.where(ours_TA.reshape(-1), row_N, rows),
    expert_K=jnp.clip(experts_TA.reshape(-1), 0, num_experts - 1),
    num_blocks=rows,
  )


def _hidden(x_RD, gate_DF, up_DF):
  gate_RF = _dot(x_RD, gate_DF)
  up_RF = _dot(x_RD, up_DF)
  hidden_RF = (jax.nn.silu(gate_RF) * up_RF).astype(x_RD.dtype)
  return _Hidden(gate_RF, up_RF, hidden_RF)


def _d_hidden(hidden, d_hidden_RF):
  """Returns the gradients of the gate's and the up projection's outputs."""
  sigmoid_RF = jax.nn.sigmoid(hidden.gate_RF)
  silu_RF = hidden.gate_RF * sigmoid_RF
  slope_RF = sigmoid_RF + silu_RF * (1.0 - sigmoid_RF)
  return d_hidden_RF * hidden.up_RF * slope_RF, d_hidden_RF * silu_RF


def _dot(left, right):
  """Multiplies matrices in float32; CPUs have no faster type."""
  return left.astype(jnp.float32) @ right.astype(jnp.float32)


def _take(array_NX, row_R):
  """Takes rows; those past the end are zero."""
  return jnp.take(array_NX, row_R, axis=0, mode="fill", fill_value=0)


def _tokens(array_TX, row_R, experts_TA):
  """Takes the tokens that rows belong to; an empty place gets zeros."""
  return _take(array_TX, row_R // experts_TA.shape[1])


def _block(array_P, index, block):
  return lax.dynamic_slice_in_dim(array_P, index * block, block)


def _add(total_EXY, expert, added_XY):
  """Adds to one expert's matrix."""
  old_1XY = lax.dynamic_slice_in_dim(total_EXY, expert, 1)
  return lax.dynamic_update_slice_in_dim(
    total_EXY, old_1XY + added_XY, expert, 0
  )


def _add_tokens(total_TX, row_R, experts_TA, added_RX):
  """Adds rows to their tokens; what stands in an empty place is left out."""
  token_R = row_R // experts_TA.shape[1]
  return total_TX.at[token_R].add(added_RX, mode="drop")
