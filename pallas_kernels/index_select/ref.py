"""The definition of the lightning indexer's scores and of exact selection."""
# B batch, T queries, S keys, I index heads, K index width, N selected keys

import jax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import visibility


def index_scores(query_BTIK, key_BSK, weight_BTI, key_scale_BS=None):
  """Returns float32 scores [B,T,S] of every pair, allowed or not (eq. 1)."""
  dot_BTIS = jnp.einsum(
    "BTIK,BSK->BTIS",
    query_BTIK.astype(jnp.float32),
    key_BSK.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  weight_BTI1 = weight_BTI.astype(jnp.float32)[..., None]
  score_BTS = jnp.sum(jnp.maximum(dot_BTIS, 0.0) * weight_BTI1, axis=2)
  if key_scale_BS is not None:
    score_BTS = score_BTS * key_scale_BS[:, None, :]
  return score_BTS


def select(
  query_BTIK,
  key_BSK,
  weight_BTI,
  slots_BT,
  query_segments_BT,
  key_segments_BS,
  key_scale_BS,
  *,
  top_k,
  want_mask,
  want_indices,
):
  """Sorts every row whole; see the front for what it returns."""
  num_keys = key_BSK.shape[1]
  score_BTS = index_scores(query_BTIK, key_BSK, weight_BTI, key_scale_BS)
  allowed_BTS = visibility.allowed(
    slots_BT, num_keys, query_segments_BT, key_segments_BS
  )
  invalid_BT = jnp.any(allowed_BTS & jnp.isnan(score_BTS), axis=-1)
  # Two keys of a stable sort: allowed before the rest, then best first. Adding
  # zero to -0.0 gives 0.0, so that equal scores stay in the order of the keys.
  descending_BTS = -score_BTS + 0.0
  hidden_BTS = (~allowed_BTS).astype(jnp.int32)
  key_index_BTS = jnp.broadcast_to(
    jnp.arange(num_keys, dtype=jnp.int32), score_BTS.shape
  )
  _, _, order_BTS = jax.lax.sort(
    (hidden_BTS, descending_BTS, key_index_BTS), num_keys=2, is_stable=True
  )
  rank_BTS = jnp.argsort(order_BTS, axis=-1)
  selected_BTS = (rank_BTS < top_k) & allowed_BTS & ~invalid_BT[..., None]
  mask_BTW = bitmask.pack(selected_BTS)
  indices_BTN = bitmask.to_indices(mask_BTW, top_k, num_keys)
  return (
    mask_BTW if want_mask else None,
    indices_BTN if want_indices else None,
    _log_sum_exp(score_BTS, allowed_BTS & ~invalid_BT[..., None]),
    _log_sum_exp(score_BTS, selected_BTS),
    invalid_BT,
  )


def _log_sum_exp(score_BTS, where_BTS):
  masked_BTS = jnp.where(where_BTS, score_BTS, -jnp.inf)
  return jax.scipy.special.logsumexp(masked_BTS, axis=-1)
