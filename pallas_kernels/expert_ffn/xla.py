"""The routed experts in plain XLA for CPU: one block of rows at a time.

XLA's CPU `ragged_dot` multiplies every row by every expert. Here the rows of
(token, slot) are given places, expert after expert, each expert's first row on
a block boundary; a running count of the one-hot experts finds them without a
sort. A loop over as many blocks as the routing fills takes a block's tokens and
its one expert's weights, and writes the results to a buffer of rows, from which
each token sums its own. So uneven routing costs nothing but padding, at most
one part-filled block an expert. Backward does the same, recomputing the hidden
rows.

Memory: a buffer of T*A + E*block rows of D float32, and in backward the float32
gradients of the weights.
"""
# T tokens, A experts a token, E experts, D model width, F expert width, N = T*A
# rows as given, P places in blocks, K blocks, R rows of a block

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class _Plan(NamedTuple):
  """Where the rows go: places in blocks of one expert each."""

  place_TA: jax.Array  # P where the expert is not one of ours
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

  def step(index, out_PD):
    row_R = _block(plan.row_P, index, block)
    expert = plan.expert_K[index]
    x_RD = _tokens(x_TD, row_R, experts_TA)
    hidden = _hidden(x_RD, gate_EDF[expert], up_EDF[expert])
    out_RD = _dot(hidden.hidden_RF, down_EFD[expert])
    return _write(out_PD, out_RD, index)

  out_PD = jnp.zeros((plan.row_P.shape[0], x_TD.shape[1]), jnp.float32)
  out_PD = lax.fori_loop(0, plan.num_blocks, step, out_PD)
  return _combine(out_PD, plan.place_TA, weights_TA.astype(jnp.float32))


def _forward(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD):
  inputs = (x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD)
  return expert_ffn(*inputs), inputs


def _backward(inputs, d_out_TD):
  x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD = inputs
  block = _block_size(experts_TA, gate_EDF)
  plan = _plan(experts_TA, gate_EDF.shape[0], block)
  weights_N = weights_TA.astype(jnp.float32).reshape(-1)

  def step(index, totals):
    d_x_PD, d_weight_P, d_gate_EDF, d_up_EDF, d_down_EFD = totals
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
      _write(d_x_PD, d_x_RD, index),
      _write(d_weight_P, d_weight_R, index),
      d_gate_EDF.at[expert].add(_dot(x_RD.T, d_gate_RF)),
      d_up_EDF.at[expert].add(_dot(x_RD.T, d_up_RF)),
      d_down_EFD.at[expert].add(_dot(hidden_RF.T, weight_R1 * d_out_RD)),
    )

  places = plan.row_P.shape[0]
  totals = (
    jnp.zeros((places, x_TD.shape[1]), jnp.float32),
    jnp.zeros((places,), jnp.float32),
    *(jnp.zeros(w.shape, jnp.float32) for w in (gate_EDF, up_EDF, down_EFD)),
  )
  totals = lax.fori_loop(0, plan.num_blocks, step, totals)
  d_x_PD, d_weight_P, *d_matrices = totals
  d_x_TD = _combine(d_x_PD, plan.place_TA, jnp.ones_like(plan.place_TA))
  d_weights_TA = jnp.take(d_weight_P, plan.place_TA, mode="fill", fill_value=0)
  return (
    d_x_TD.astype(x_TD.dtype),
    None,
    d_weights_TA.astype(weights_TA.dtype),
    *(d.astype(w.dtype) for d, w in zip(d_matrices, inputs[3:])),
  )


expert_ffn.defvjp(_forward, _backward)


def _block_size(experts_TA, gate_EDF):
  """Returns rows of a block: fewer where experts get few rows."""
  per_expert = experts_TA.size // gate_EDF.shape[0]
  return min(128, max(8, 1 << (per_expert // 2).bit_length()))


def _plan(experts_TA, num_experts, block):
  """Places each row: after its expert's earlier rows, in that one's blocks."""
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
    place_TA=place_N.reshape(experts_TA.shape),
    row_P=row_P,
    expert_K=jnp.minimum(expert_K, num_experts - 1),
    num_blocks=end_E[-1],
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


def _write(array_PX, block_RX, index):
  start = index * block_RX.shape[0]
  return lax.dynamic_update_slice_in_dim(array_PX, block_RX, start, 0)


def _combine(rows_PD, place_TA, weights_TA):
  """Sums each token's rows, weighted; a place of P adds nothing."""
  out_TD = 0.0
  # One slot at a time: together they are an array of T*A rows.
  for slot in range(place_TA.shape[1]):
    row_TD = _take(rows_PD, place_TA[:, slot])
    out_TD += weights_TA[:, slot, None] * row_TD
  return out_TD
