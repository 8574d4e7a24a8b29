"""Gathered attention in plain XLA: a few queries at a time.

Latents and rotary keys are joined once, so that one gather fetches a key's
whole row; a loop over chunks of queries gathers [queries, N, C+R] float32,
multiplies batched by query, and forgets it. Backward gathers again, and adds
the gradients of the rows to those of all keys by a scatter. Memory beyond
inputs and outputs: a chunk's rows, and backward the float32 gradient of
[latent | rope].
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, X their
# sum, Z all keys of the batch, N selected, K chunks, Q queries of a chunk

from jax import lax
import jax.numpy as jnp

_HIDDEN = -1e30
_FLOOR = -5e29


def forward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
):
  """Returns (out_latent_BTHC, lse_BTH); see the front for what they are."""
  key_ZX, base_B = _join_keys(latent_BSC, key_rope_BSR)
  query_BTHX = scale * _join(query_latent_BTHC, query_rope_BTHR)
  latent = latent_BSC.shape[2]
  chunk = _chunk_size(indices_BTN)

  def step(inputs):
    query_QHX, indices_QN, base_Q = inputs
    row_QNX = _gather(key_ZX, indices_QN, base_Q)
    score_QHN = _scores(query_QHX, row_QNX, indices_QN)
    top_QH1 = jnp.maximum(jnp.max(score_QHN, axis=-1, keepdims=True), _FLOOR)
    exp_QHN = jnp.exp(score_QHN - top_QH1)
    sum_QH1 = jnp.sum(exp_QHN, axis=-1, keepdims=True)
    out_QHC = jnp.einsum("QHN,QNC->QHC", exp_QHN, row_QNX[..., :latent])
    empty_QH1 = sum_QH1 == 0.0
    safe_QH1 = jnp.where(empty_QH1, 1.0, sum_QH1)
    lse_QH1 = jnp.where(empty_QH1, -jnp.inf, top_QH1 + jnp.log(safe_QH1))
    return out_QHC / safe_QH1, lse_QH1[..., 0]

  out_KQHC, lse_KQH = lax.map(
    step, _chunks(chunk, query_BTHX, indices_BTN, base_B)
  )
  shape = query_latent_BTHC.shape[:3]
  out_BTHC = _unchunk(out_KQHC, (*shape, latent)).astype(latent_BSC.dtype)
  return out_BTHC, _unchunk(lse_KQH, shape)


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
  key_ZX, base_B = _join_keys(latent_BSC, key_rope_BSR)
  query_BTHX = scale * _join(query_latent_BTHC, query_rope_BTHR)
  latent = latent_BSC.shape[2]
  chunk = _chunk_size(indices_BTN)
  d_out_BTHC = d_out_BTHC.astype(jnp.float32)
  mean_BTH = jnp.sum(d_out_BTHC * out_BTHC.astype(jnp.float32), axis=-1)
  # An empty list has lse -inf; with 0 its hidden scores still give exp 0.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH)

  def step(d_key_ZX, inputs):
    query_QHX, indices_QN, base_Q, d_out_QHC, mean_QH, lse_QH = inputs
    row_QNX = _gather(key_ZX, indices_QN, base_Q)
    score_QHN = _scores(query_QHX, row_QNX, indices_QN)
    weight_QHN = jnp.exp(score_QHN - lse_QH[..., None])
    d_weight_QHN = jnp.einsum("QHC,QNC->QHN", d_out_QHC, row_QNX[..., :latent])
    d_score_QHN = weight_QHN * (d_weight_QHN - mean_QH[..., None])
    d_query_QHX = jnp.einsum("QHN,QNX->QHX", d_score_QHN, row_QNX)
    d_row_QNX = jnp.einsum("QHN,QHX->QNX", d_score_QHN, query_QHX)
    d_value_QNC = jnp.einsum("QHN,QHC->QNC", weight_QHN, d_out_QHC)
    d_row_QNX = d_row_QNX.at[..., :latent].add(d_value_QNC)
    rows_QN = jnp.where(indices_QN < 0, key_ZX.shape[0], indices_QN)
    rows_QN += jnp.where(indices_QN < 0, 0, base_Q[:, None])
    return d_key_ZX.at[rows_QN].add(d_row_QNX, mode="drop"), d_query_QHX

  chunks = _chunks(
    chunk, query_BTHX, indices_BTN, base_B, d_out_BTHC, mean_BTH, lse_BTH
  )
  d_key_ZX, d_query_KQHX = lax.scan(step, jnp.zeros_like(key_ZX), chunks)
  d_query_BTHX = scale * _unchunk(d_query_KQHX, query_BTHX.shape)
  d_key_BSX = d_key_ZX.reshape(*latent_BSC.shape[:2], -1)
  return (
    d_query_BTHX[..., :latent].astype(query_latent_BTHC.dtype),
    d_query_BTHX[..., latent:].astype(query_rope_BTHR.dtype),
    d_key_BSX[..., :latent].astype(latent_BSC.dtype),
    d_key_BSX[..., latent:].astype(key_rope_BSR.dtype),
  )


def _chunk_size(indices_BTN):
  """Returns queries of a chunk: their gathered rows fit the second cache."""
  return max(1, min(indices_BTN.shape[0] * indices_BTN.shape[1], 16))


def _join(left, right):
  return jnp.concatenate(
    [left.astype(jnp.float32), right.astype(jnp.float32)], axis=-1
  )


def _join_keys(latent_BSC, key_rope_BSR):
  """Returns float32 [latent | rope] of the batch's keys and first rows [B]."""
  key_BSX = _join(latent_BSC, key_rope_BSR)
  batch, keys, width = key_BSX.shape
  base_B = jnp.arange(batch, dtype=jnp.int32) * keys
  return key_BSX.reshape(batch * keys, width), base_B


def _gather(key_ZX, indices_QN, base_Q):
  """Returns the listed rows [Q,N,X]; index -1 takes some row."""
  rows_QN = jnp.maximum(indices_QN, 0) + base_Q[:, None]
  return jnp.take(key_ZX, rows_QN, axis=0, mode="clip")


def _scores(query_QHX, row_QNX, indices_QN):
  score_QHN = jnp.einsum("QHX,QNX->QHN", query_QHX, row_QNX)
  return jnp.where((indices_QN >= 0)[:, None], score_QHN, _HIDDEN)


def _chunks(chunk, query_BTHX, indices_BTN, base_B, *arrays_BT):
  """Cuts [B,T,...] arrays into [K,Q,...]; padding lists no key."""
  base_BT = jnp.broadcast_to(base_B[:, None], indices_BTN.shape[:2])
  filled = [(query_BTHX, 0), (indices_BTN, -1), (base_BT, 0)]
  filled += [(array, 0) for array in arrays_BT]
  return tuple(_cut(chunk, array, value) for array, value in filled)


def _cut(chunk, array_BTX, value):
  flat = array_BTX.reshape(-1, *array_BTX.shape[2:])
  missing = -flat.shape[0] % chunk
  lead = [(0, missing)] + [(0, 0)] * (flat.ndim - 1)
  padded = jnp.pad(flat, lead, constant_values=value)
  return padded.reshape(-1, chunk, *flat.shape[1:])


def _unchunk(array_KQX, shape):
  """Undoes `_cut`."""
  flat = array_KQX.reshape(-1, *array_KQX.shape[2:])
  return flat[: shape[0] * shape[1]].reshape(shape)
