"""Definition of masked attention: float32, every score at once."""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, W words of 32 keys

import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import visibility


def forward(query_BTHQ, key_BSGQ, value_BSGV, visible, scale):
  """Returns (out_BTHV, lse_BTH); see the front for what they are."""
  weights_BHTS, lse_BHT = _weights(query_BTHQ, key_BSGQ, visible, scale)
  value_BSHV = _per_head(value_BSGV, query_BTHQ.shape[2])
  out_BTHV = jnp.einsum("BHTS,BSHV->BTHV", weights_BHTS, value_BSHV)
  return out_BTHV.astype(value_BSGV.dtype), jnp.moveaxis(lse_BHT, 1, 2)


def backward(
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  visible,
  scale,
  out_BTHV,
  lse_BTH,
  d_out_BTHV,
):
  """Returns the gradients of query, key and value in their dtypes."""
  del out_BTHV, lse_BTH  # recomputed: the definition keeps nothing
  heads = query_BTHQ.shape[2]
  query = query_BTHQ.astype(jnp.float32)
  key_BSHQ = _per_head(key_BSGQ, heads)
  value_BSHV = _per_head(value_BSGV, heads)
  d_out = d_out_BTHV.astype(jnp.float32)
  weights_BHTS, _ = _weights(query_BTHQ, key_BSGQ, visible, scale)
  d_weights_BHTS = jnp.einsum("BTHV,BSHV->BHTS", d_out, value_BSHV)
  mean_BHT1 = jnp.sum(weights_BHTS * d_weights_BHTS, axis=-1, keepdims=True)
  d_score_BHTS = scale * weights_BHTS * (d_weights_BHTS - mean_BHT1)
  d_query_BTHQ = jnp.einsum("BHTS,BSHQ->BTHQ", d_score_BHTS, key_BSHQ)
  d_key_BSHQ = jnp.einsum("BHTS,BTHQ->BSHQ", d_score_BHTS, query)
  d_value_BSHV = jnp.einsum("BHTS,BTHV->BSHV", weights_BHTS, d_out)
  return (
    d_query_BTHQ.astype(query_BTHQ.dtype),
    _summed(d_key_BSHQ, key_BSGQ),
    _summed(d_value_BSHV, value_BSGV),
  )


def _weights(query_BTHQ, key_BSGQ, visible, scale):
  """Returns float32 softmax weights [B,H,T,S] and log-sum-exps [B,H,T]."""
  slots_BT, mask_BTW, query_segments_BT, key_segments_BS = visible
  keys = key_BSGQ.shape[1]
  seen_BTS = visibility.allowed(
    slots_BT, keys, query_segments_BT, key_segments_BS
  )
  if mask_BTW is not None:
    seen_BTS &= bitmask.unpack(mask_BTW, keys)
  seen_B1TS = seen_BTS[:, None]
  query = query_BTHQ.astype(jnp.float32)
  key_BSHQ = _per_head(key_BSGQ, query_BTHQ.shape[2])
  score_BHTS = scale * jnp.einsum("BTHQ,BSHQ->BHTS", query, key_BSHQ)
  score_BHTS = jnp.where(seen_B1TS, score_BHTS, -jnp.inf)
  top_BHT1 = jnp.max(score_BHTS, axis=-1, keepdims=True, initial=-jnp.inf)
  top_BHT1 = jnp.where(jnp.isneginf(top_BHT1), 0.0, top_BHT1)
  exp_BHTS = jnp.exp(score_BHTS - top_BHT1)
  sum_BHT1 = jnp.sum(exp_BHTS, axis=-1, keepdims=True)
  lse_BHT = (top_BHT1 + jnp.log(sum_BHT1))[..., 0]
  return exp_BHTS / jnp.where(sum_BHT1 == 0.0, 1.0, sum_BHT1), lse_BHT


def _per_head(array_BSGX, heads):
  """Returns the float32 key or value array with one copy for each head."""
  array = array_BSGX.astype(jnp.float32)
  return jnp.broadcast_to(array, (*array.shape[:2], heads, array.shape[3]))


def _summed(gradient_BSHX, like_BSGX):
  """Adds up the gradients of the heads that shared one key head."""
  if like_BSGX.shape[2] == 1:
    gradient_BSHX = jnp.sum(gradient_BSHX, axis=2, keepdims=True)
  return gradient_BSHX.astype(like_BSGX.dtype)
