"""Definition of the routed experts: every expert for every token, weighted."""
# T tokens, A experts a token, E experts, D model width, F expert width

import jax
import jax.numpy as jnp


def expert_ffn(x_TD, experts_TA, weights_TA, gate_EDF, up_EDF, down_EFD):
  """Returns out_TD float32; see the front for what it is."""
  experts = jnp.arange(gate_EDF.shape[0])
  chosen_TAE = experts_TA[:, :, None] == experts
  weights_TE = jnp.einsum(
    "TA,TAE->TE", weights_TA.astype(jnp.float32), chosen_TAE
  )
  gate_TEF = _project("TD,EDF->TEF", x_TD, gate_EDF)
  up_TEF = _project("TD,EDF->TEF", x_TD, up_EDF)
  hidden_TEF = (jax.nn.silu(gate_TEF) * up_TEF).astype(x_TD.dtype)
  out_TED = _project("TEF,EFD->TED", hidden_TEF, down_EFD)
  return jnp.einsum("TE,TED->TD", weights_TE, out_TED)


def _project(axes, array, weight):
  return jnp.einsum(axes, array.astype(jnp.float32), weight.astype(jnp.float32))
