"""The definition of the indexer's KL loss, over all or over listed keys."""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# G key heads (H or 1), Q query width, C latent, R rope width, N selected keys

import jax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import visibility

HIGHEST = jax.lax.Precision.HIGHEST


def indexer_kl(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_BTHQ,
  key_BSGQ,
  lse_BTH,
  slots_BT,
  mask_BTW,
  query_segments_BT,
  key_segments_BS,
  *,
  scale,
):
  """Returns float32 KL [B,T] against all keys; see the front."""
  num_keys = key_BSGQ.shape[1]
  allowed_BTS = visibility.allowed(
    slots_BT, num_keys, query_segments_BT, key_segments_BS
  )
  if mask_BTW is not None:
    allowed_BTS &= bitmask.unpack(mask_BTW, num_keys)
  dot_BTIS = jnp.einsum(
    "BTIK,BSK->BTIS",
    index_query_BTIK.astype(jnp.float32),
    index_key_BSK.astype(jnp.float32),
    precision=HIGHEST,
  )
  key_BSHQ = jnp.broadcast_to(
    key_BSGQ, (*key_BSGQ.shape[:2], *query_BTHQ.shape[2:])
  )
  attention_BTHS = scale * jnp.einsum(
    "BTHQ,BSHQ->BTHS",
    query_BTHQ.astype(jnp.float32),
    key_BSHQ.astype(jnp.float32),
    precision=HIGHEST,
  )
  score_BTS = _index_score(dot_BTIS, index_weight_BTI)
  target_BTS = _target(attention_BTHS, lse_BTH, allowed_BTS)
  return _kl(score_BTS, target_BTS, allowed_BTS)


def indexer_kl_gathered(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  lse_BTH,
  indices_BTN,
  *,
  scale,
):
  """Returns float32 KL [B,T] against the listed keys; see the front."""
  take = jax.vmap(lambda rows_S, indices_TN: rows_S[indices_TN])
  index_BTN = jnp.maximum(indices_BTN, 0)
  key_BTNK = take(index_key_BSK, index_BTN).astype(jnp.float32)
  latent_BTNC = take(latent_BSC, index_BTN).astype(jnp.float32)
  rope_BTNR = take(key_rope_BSR, index_BTN).astype(jnp.float32)
  dot_BTIN = jnp.einsum(
    "BTIK,BTNK->BTIN",
    index_query_BTIK.astype(jnp.float32),
    key_BTNK,
    precision=HIGHEST,
  )
  attention_BTHN = scale * (
    jnp.einsum(
      "BTHC,BTNC->BTHN",
      query_latent_BTHC.astype(jnp.float32),
      latent_BTNC,
      precision=HIGHEST,
    )
    + jnp.einsum(
      "BTHR,BTNR->BTHN",
      query_rope_BTHR.astype(jnp.float32),
      rope_BTNR,
      precision=HIGHEST,
    )
  )
  allowed_BTN = indices_BTN >= 0
  score_BTN = _index_score(dot_BTIN, index_weight_BTI)
  target_BTN = _target(attention_BTHN, lse_BTH, allowed_BTN)
  return _kl(score_BTN, target_BTN, allowed_BTN)


def _index_score(dot_BTIS, weight_BTI):
  weight_BTI1 = weight_BTI.astype(jnp.float32)[..., None]
  return jnp.sum(jax.nn.relu(dot_BTIS) * weight_BTI1, axis=2)


def _target(attention_BTHS, lse_BTH, allowed_BTS):
  """Head-summed, L1-normalised attention; a constant. Zero for an empty row."""
  seen_BTHS = allowed_BTS[:, :, None, :] & (lse_BTH != -jnp.inf)[..., None]
  exponent_BTHS = jnp.where(seen_BTHS, attention_BTHS - lse_BTH[..., None], 0.0)
  mass_BTS = jnp.sum(jnp.where(seen_BTHS, jnp.exp(exponent_BTHS), 0.0), axis=2)
  total_BT1 = jnp.sum(mass_BTS, axis=-1, keepdims=True)
  target_BTS = mass_BTS / jnp.where(total_BT1 != 0, total_BT1, 1.0)
  return jax.lax.stop_gradient(target_BTS)


def _kl(score_BTS, target_BTS, allowed_BTS):
  """Sums p (log p - log softmax(score)) over the allowed keys."""
  best_BT1 = jnp.max(
    score_BTS, axis=-1, keepdims=True, initial=-jnp.inf, where=allowed_BTS
  )
  best_BT1 = jax.lax.stop_gradient(
    jnp.where(jnp.isfinite(best_BT1), best_BT1, 0.0)
  )
  shifted_BTS = jnp.where(allowed_BTS, score_BTS - best_BT1, 0.0)
  total_BT1 = jnp.sum(
    jnp.exp(shifted_BTS), axis=-1, keepdims=True, where=allowed_BTS
  )
  # An empty row has a total of 0, whose logarithm has no finite gradient.
  log_total_BT1 = jnp.log(jnp.where(total_BT1 > 0, total_BT1, 1.0))
  log_model_BTS = shifted_BTS - log_total_BT1
  held_BTS = target_BTS != 0
  log_target_BTS = jnp.log(jnp.where(held_BTS, target_BTS, 1.0))
  return jnp.sum(
    jnp.where(held_BTS, target_BTS * (log_target_BTS - log_model_BTS), 0.0),
    axis=-1,
  )
