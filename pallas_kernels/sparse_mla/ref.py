"""Definition of gathered attention: float32, every gathered key at once."""
# B batch, T queries, S keys, H heads, C latent width, R rope width, N selected

import jax
import jax.numpy as jnp


def forward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
):
  """Returns (out_latent_BTHC, lse_BTH); see the front for what they are."""
  latent_BTNC = _gather(latent_BSC, indices_BTN)
  rope_BTNR = _gather(key_rope_BSR, indices_BTN)
  score_BTHN = jnp.einsum(
    "BTHC,BTNC->BTHN", query_latent_BTHC.astype(jnp.float32), latent_BTNC
  )
  score_BTHN += jnp.einsum(
    "BTHR,BTNR->BTHN", query_rope_BTHR.astype(jnp.float32), rope_BTNR
  )
  listed_BT1N = (indices_BTN >= 0)[:, :, None]
  score_BTHN = jnp.where(listed_BT1N, scale * score_BTHN, -jnp.inf)
  top_BTH1 = jnp.max(score_BTHN, axis=-1, keepdims=True, initial=-jnp.inf)
  top_BTH1 = jnp.where(jnp.isneginf(top_BTH1), 0.0, top_BTH1)
  exp_BTHN = jnp.exp(score_BTHN - top_BTH1)
  sum_BTH1 = jnp.sum(exp_BTHN, axis=-1, keepdims=True)
  weights_BTHN = exp_BTHN / jnp.where(sum_BTH1 == 0.0, 1.0, sum_BTH1)
  out_BTHC = jnp.einsum("BTHN,BTNC->BTHC", weights_BTHN, latent_BTNC)
  lse_BTH = (top_BTH1 + jnp.log(sum_BTH1))[..., 0]
  return out_BTHC.astype(latent_BSC.dtype), lse_BTH


def backward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
  out_BTHC,
  lse_BTH,
  d_out_BTHC,
):
  """Returns the gradients of the four arrays in their dtypes."""
  del out_BTHC, lse_BTH  # recomputed: the definition keeps nothing

  def out(*arrays):
    return forward(*arrays, indices_BTN, scale)[0]

  _, pull_back = jax.vjp(
    out, query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR
  )
  return pull_back(d_out_BTHC)


def _gather(array_BSX, indices_BTN):
  """Returns float32 [B,T,N,X]; index -1 takes row 0, to be hidden later."""
  rows_BTN = jnp.maximum(indices_BTN, 0)
  batch_B11 = jnp.arange(array_BSX.shape[0])[:, None, None]
  return array_BSX.astype(jnp.float32)[batch_B11, rows_BTN]
