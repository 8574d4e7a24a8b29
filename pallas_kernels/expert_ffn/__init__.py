"""The routed experts of a mixture: each token's SwiGLU experts, weighted.

Paper (DeepSeek-V3, section 2.1.2): the routed part of DeepSeekMoE. No token is
dropped, however uneven the routing; memory is a constant times T*A rows.
"""
# T tokens, A experts a token, E experts, D model width, F expert width

import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.expert_ffn import ragged
from pallas_kernels.expert_ffn import ref
from pallas_kernels.expert_ffn import tpu
from pallas_kernels.expert_ffn import xla

_IMPLEMENTATIONS = {
  "ref": ref.expert_ffn,
  "xla": xla.expert_ffn,
  "ragged": ragged.expert_ffn,
  "tpu": tpu.expert_ffn,
  "tpu_interpret": implementations.interpreted(tpu.expert_ffn),
}


def expert_ffn(
  x_TD,
  experts_TA,
  weights_TA,
  gate_EDF,
  up_EDF,
  down_EFD,
  *,
  implementation: str | None = None,
):
  """Returns sum_a weight[t,a] * down_e(silu(x gate_e) * (x up_e)), float32.

  e is experts[t, a]; an id outside [0, E) contributes nothing, which is how a
  shard that holds some of the experts calls this. Products are summed in
  float32; silu times up is float32 and cast to the dtype of x before `down`.
  Differentiable in x, weights, gate, up and down.

  Args:
    x_TD: tokens, float.
    experts_TA: integer expert ids; one that is no expert adds nothing.
    weights_TA: float32 router weights.
    gate_EDF: gate projections.
    up_EDF: up projections.
    down_EFD: down projections.
    implementation: "ref" (all experts for all tokens), "xla" (blocks of rows of
      one expert, for CPU), "ragged" (sorted rows and `jax.lax.ragged_dot`, for
      GPU), "tpu" (the same, with a kernel for the matrices' gradients),
      "tpu_interpret" (that, interpreted on any device, slowly), or None, which
      is "xla".

  Returns:
    out_TD float32.

  Raises:
    ValueError: shapes or dtypes that do not fit, an unknown implementation.
  """
  name = implementations.choose(_IMPLEMENTATIONS, implementation)
  _check(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD)
  # Narrow integers could not tell an expert from the number of experts.
  experts_TA = experts_TA.astype(jnp.int32)
  return _IMPLEMENTATIONS[name](
    x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD
  )


def _check(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD):
  if x_TD.ndim != 2 or gate_EDF.ndim != 3 or experts_TA.ndim != 2:
    raise ValueError(
      f"{x_TD.shape=}, {experts_TA.shape=}, {gate_EDF.shape=} must be [T,D], "
      "[T,A], [E,D,F]"
    )
  implementations.refuse_empty(x_TD, experts_TA, gate_EDF)
  experts, width, hidden = gate_EDF.shape
  if x_TD.shape[1] != width:
    raise ValueError(f"{x_TD.shape=} does not fit {gate_EDF.shape=}")
  if up_EDF.shape != gate_EDF.shape:
    raise ValueError(f"{up_EDF.shape=} differs from {gate_EDF.shape=}")
  if down_EFD.shape != (experts, hidden, width):
    raise ValueError(f"{down_EFD.shape=} must be {(experts, hidden, width)}")
  if experts_TA.shape[0] != x_TD.shape[0]:
    raise ValueError(f"{experts_TA.shape=} does not fit {x_TD.shape=}")
  if weights_TA.shape != experts_TA.shape:
    raise ValueError(f"{weights_TA.shape=} differs from {experts_TA.shape=}")
  if not jnp.issubdtype(experts_TA.dtype, jnp.integer):
    raise ValueError(f"{experts_TA.dtype=} must be an integer")
  for array in (x_TD, weights_TA, gate_EDF, up_EDF, down_EFD):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{array.dtype=} must be floating")
