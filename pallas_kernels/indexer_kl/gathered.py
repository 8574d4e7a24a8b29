"""The KL loss over listed keys in plain XLA.

Queries go in chunks of at most 32, and each gathers its own N rows: index keys,
latents, rotated keys. The rest is as in the masked form, on blocks [C,N], with
the gradient of a gathered key added to its row at the end of a chunk.

Memory a step: gathered rows [32,N,K + C + R] and scores of all heads [32,H,N].
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# L latent, R rope width, C queries of a chunk, N selected keys

import functools

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import tiles

CHUNK = 32

_einsum = functools.partial(
  jnp.einsum,
  precision=lax.Precision.HIGHEST,
  preferred_element_type=jnp.float32,
)


def evaluate(scale, trained, constants, weight_BT):
  """Returns (kl_BT, gradients of sum(weight kl) by `trained`, or None)."""
  query_BTIK, key_BSK, weight_BTI = trained
  latent_BTHL, rope_BTHR, key_latent_BSL, key_rope_BSR, lse_BTH, indices_BTN = (
    constants
  )
  queries = indices_BTN.shape[1]
  chunk = min(CHUNK, queries)
  arrays = (
    query_BTIK.astype(jnp.float32),
    weight_BTI.astype(jnp.float32),
    scale * latent_BTHL.astype(jnp.float32),
    scale * rope_BTHR.astype(jnp.float32),
    jnp.where(lse_BTH == -jnp.inf, jnp.inf, lse_BTH),
    indices_BTN + 1,
    weight_BT,
  )
  keys = (key_BSK, key_latent_BSL, key_rope_BSR)
  arrays = jax.tree.map(
    lambda x: tiles.pad(x, -(-queries // chunk) * chunk), arrays
  )
  kl_BT, gradients = lax.map(lambda x: _row(chunk, *x), (arrays, keys))
  if weight_BT is None:
    return kl_BT[:, :queries], None
  query_gradient, key_gradient, weight_gradient = gradients
  return kl_BT[:, :queries], (
    query_gradient[:, :queries].astype(query_BTIK.dtype),
    key_gradient.astype(key_BSK.dtype),
    weight_gradient[:, :queries].astype(weight_BTI.dtype),
  )


def _row(chunk, arrays, keys):
  """Returns kl_T and, given cotangents, the gradients of one batch row."""
  queries = arrays[0].shape[0]

  def body(key_gradient_SK, start):
    own = jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, chunk), arrays
    )
    kl_C, gradients = _chunk(own, keys)
    if gradients is None:
      return key_gradient_SK, (kl_C, None)
    query_CIK, rows_CNK, weight_CI = gradients
    # A place of 0 is no key: its gradient falls off the array's end.
    index_CN = jnp.where(own[5] > 0, own[5] - 1, key_gradient_SK.shape[0])
    key_gradient_SK = key_gradient_SK.at[index_CN].add(rows_CNK, mode="drop")
    return key_gradient_SK, (kl_C, (query_CIK, weight_CI))

  zeros_SK = jnp.zeros(keys[0].shape, jnp.float32)
  starts = jnp.arange(0, queries, chunk)
  key_gradient_SK, outputs = lax.scan(body, zeros_SK, starts)
  kl_T, gradients = jax.tree.map(
    lambda x: x.reshape(queries, *x.shape[2:]), outputs
  )
  if gradients is None:
    return kl_T, None
  query_TIK, weight_TI = gradients
  return kl_T, (query_TIK, key_gradient_SK, weight_TI)


def _chunk(own, keys):
  """Returns kl_C and, given cotangents, gradients (query, key rows, weight)."""
  query_CIK, weight_CI, *attention, lse_CH, place_CN, cotangent_C = own
  latent_CHL, rope_CHR = attention
  seen_CN = place_CN > 0
  index_CN = jnp.maximum(place_CN - 1, 0)
  key_CNK, key_latent_CNL, key_rope_CNR = (
    jnp.take(x, index_CN, axis=0, mode="clip").astype(jnp.float32) for x in keys
  )
  dot_CIN = _einsum("CIK,CNK->CIN", query_CIK, key_CNK)
  score_CN = jnp.sum(jnp.maximum(dot_CIN, 0.0) * weight_CI[..., None], axis=1)
  attention_CHN = _einsum("CHL,CNL->CHN", latent_CHL, key_latent_CNL)
  attention_CHN += _einsum("CHR,CNR->CHN", rope_CHR, key_rope_CNR)
  mass_CN = jnp.sum(jnp.exp(attention_CHN - lse_CH[..., None]), axis=1)
  kl_C, slope_CN = kl_and_slope(mass_CN, score_CN, seen_CN)
  if cotangent_C is None:
    return kl_C, None
  gated_CIN = jnp.where(dot_CIN > 0, slope_CN[:, None, :], 0.0)
  u_CIK = _einsum("CIN,CNK->CIK", gated_CIN, key_CNK)
  pulled_CI = weight_CI * cotangent_C[:, None]
  rows_CNK = _einsum(
    "CIN,CIK->CNK", gated_CIN, query_CIK * pulled_CI[..., None]
  )
  weight_gradient_CI = jnp.sum(u_CIK * query_CIK, -1) * cotangent_C[:, None]
  return kl_C, (u_CIK * pulled_CI[..., None], rows_CNK, weight_gradient_CI)


def kl_and_slope(mass_CN, score_CN, seen_CN):
  """Returns the KL of each query, and its slope by the score of each key.

  Args:
    mass_CN: attention of each key, summed over heads and not normalised.
    score_CN: index scores.
    seen_CN: which keys count; those of others may hold anything.

  Returns:
    (kl_C, slope_CN), 0 where no key counts.
  """
  mass_CN = jnp.where(seen_CN, mass_CN, 0.0)
  mass_C1 = jnp.sum(mass_CN, axis=-1, keepdims=True)
  held_C1 = mass_C1 != 0
  target_CN = mass_CN / jnp.where(held_C1, mass_C1, 1.0)
  best_C1 = jnp.max(
    jnp.where(seen_CN, score_CN, -jnp.inf), axis=-1, keepdims=True
  )
  best_C1 = jnp.where(best_C1 == -jnp.inf, 0.0, best_C1)
  shifted_CN = jnp.where(seen_CN, score_CN - best_C1, -jnp.inf)
  total_C1 = jnp.sum(jnp.exp(shifted_CN), axis=-1, keepdims=True)
  log_total_C1 = jnp.log(jnp.where(total_C1 > 0, total_C1, 1.0))
  log_model_CN = shifted_CN - log_total_C1
  used_CN = target_CN != 0
  log_target_CN = jnp.log(jnp.where(used_CN, target_CN, 1.0))
  kl_CN = jnp.where(used_CN, target_CN * (log_target_CN - log_model_CN), 0.0)
  slope_CN = jnp.where(held_C1, jnp.exp(log_model_CN) - target_CN, 0.0)
  return jnp.sum(kl_CN, axis=-1), slope_CN
