"""The routed experts as grouped products over rows sorted by expert.

A stable sort puts the (token, slot) rows of an expert next to each other, rows
of no expert last; `jax.lax.ragged_dot` multiplies each group by its expert's
matrix, and a scatter-add sums a token's rows. Memory: T*A rows of D and F.
"""
# T tokens, A experts a token, E experts, D model width, F expert width, N rows

import jax
from jax import lax
import jax.numpy as jnp


def expert_ffn(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD):
  """Returns out_TD float32; see the front for what it is."""
  experts = gate_EDF.shape[0]
  per_token = experts_TA.shape[1]
  flat_N = experts_TA.reshape(-1)
  flat_N = jnp.where((flat_N >= 0) & (flat_N < experts), flat_N, experts)
  order_N = jnp.argsort(flat_N, stable=True)
  sorted_N = flat_N[order_N]
  sizes_E = jnp.bincount(flat_N, length=experts + 1)[:experts]
  token_N = order_N // per_token

  def grouped(rows, weight):
    return lax.ragged_dot(
      rows, weight, sizes_E, preferred_element_type=jnp.float32
    )

  x_ND = x_TD[token_N]
  gate_NF = grouped(x_ND, gate_EDF)
  up_NF = grouped(x_ND, up_EDF)
  hidden_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_TD.dtype)
  out_ND = grouped(hidden_NF, down_EFD)
  weights_N = weights_TA.astype(jnp.float32).reshape(-1)[order_N]
  # Rows of no expert belong to no group: what a product puts there is unsaid.
  out_ND = jnp.where(
    (sorted_N < experts)[:, None], weights_N[:, None] * out_ND, 0.0
  )
  out_TD = jnp.zeros(x_TD.shape, jnp.float32)
  return out_TD.at[token_N].add(out_ND)
