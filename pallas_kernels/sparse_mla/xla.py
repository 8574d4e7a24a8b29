"""Gathered attention in plain XLA: a few queries at a time.

Latents and rotary keys are joined once, so that one gather fetches a key's
whole row; a loop over chunks of queries gathers [queries, N, C+R] float32, few
enough to stay in the second cache, multiplies batched by query, and forgets
them. Where fewer rows are fetched than there are keys (decoding), the parts of
the fetched rows are joined instead. Backward gathers again, and adds the
gradients of the rows to those of all keys by a scatter. Memory beyond inputs
and outputs: a chunk's rows, and backward the float32 gradient of
[latent | rope].
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, X their
# sum, Z all keys of the batch, N selected, K chunks, Q queries of a chunk

from jax import lax
import jax.numpy as jnp

# Scores of padding, and a floor of the maximum above them, so that
# exp(score - maximum) is 0 for padding even where a list is empty.
_HIDDEN = -1e30
_FLOOR = -5e29

# Bytes of the gathered rows of a chunk.
_CHUNK_BYTES = 5 * 2**18


def forward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
):
  """Returns (out_latent_BTHC, lse_BTH); see the front for what they are."""
  parts = (_flat(latent_BSC), _flat(key_rope_BSR))
  if indices_BTN.size >= parts[0].shape[0]:
    parts = (_join(*parts),)
  query_BTHX = scale * _join(query_latent_BTHC, query_rope_BTHR)
  latent = latent_BSC.shape[2]

  def step(inputs):
    query_QHX, indices_QN, row_QN = inputs
    key_QNX = _gather(parts, row_QN)
    score_QHN = _products(query_QHX, key_QNX)
    score_QHN = jnp.where((indices_QN >= 0)[:, None], score_QHN, _HIDDEN)
    top_QH1 = jnp.maximum(jnp.max(score_QHN, axis=-1, keepdims=True), _FLOOR)
    exp_QHN = jnp.exp(score_QHN - top_QH1)
    sum_QH1 = jnp.sum(exp_QHN, axis=-1, keepdims=True)
    # With the rotary columns: to cut them off the rows costs a copy.
    out_QHX = jnp.einsum("QHN,QNX->QHX", exp_QHN, key_QNX)
    # NaN scores must stay NaN: only an exact zero means an empty list.
    empty_QH1 = sum_QH1 == 0.0
    safe_QH1 = jnp.where(empty_QH1, 1.0, sum_QH1)
    lse_QH1 = jnp.where(empty_QH1, -jnp.inf, top_QH1 + jnp.log(safe_QH1))
    return out_QHX[..., :latent] / safe_QH1, lse_QH1[..., 0]

  chunk = _chunk_size(indices_BTN, query_BTHX.shape[-1])
  queries = (query_BTHX, indices_BTN, _rows(indices_BTN, latent_BSC))
  out_KQHC, lse_KQH = lax.map(step, tuple(_cut(chunk, a) for a in queries))
  shape = query_latent_BTHC.shape
  out_BTHC = _uncut(out_KQHC, shape).astype(latent_BSC.dtype)
  return out_BTHC, _uncut(lse_KQH, shape[:3])


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
  key_ZX = _join(_flat(latent_BSC), _flat(key_rope_BSR))
  query_BTHX = scale * _join(query_latent_BTHC, query_rope_BTHR)
  latent = latent_BSC.shape[2]
  d_out_BTHC = d_out_BTHC.astype(jnp.float32)
  mean_BTH = jnp.sum(d_out_BTHC * out_BTHC.astype(jnp.float32), axis=-1)
  d_out_BTHX = _join(d_out_BTHC, jnp.zeros_like(query_rope_BTHR))
  # An empty list has lse -inf and no row whose weight counts.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH)

  def step(d_key_ZX, inputs):
    both_QYX, indices_QN, row_QN, mean_QH, lse_QH = inputs
    key_QNX = _gather((key_ZX,), row_QN)
    # Queries and output cotangents (Y, twice the heads) meet the keys at once.
    product_QYN = _products(both_QYX, key_QNX)
    score_QHN, d_weight_QHN = jnp.split(product_QYN, 2, axis=1)
    score_QHN = jnp.where((indices_QN >= 0)[:, None], score_QHN, _HIDDEN)
    weight_QHN = jnp.exp(score_QHN - lse_QH[..., None])
    d_score_QHN = weight_QHN * (d_weight_QHN - mean_QH[..., None])
    d_query_QHX = jnp.einsum("QHN,QNX->QHX", d_score_QHN, key_QNX)
    factor_QYN = jnp.concatenate([d_score_QHN, weight_QHN], axis=1)
    d_key_QNX = jnp.einsum("QYN,QYX->QNX", factor_QYN, both_QYX)
    return d_key_ZX.at[row_QN].add(d_key_QNX, mode="drop"), d_query_QHX

  both_BTYX = jnp.concatenate([query_BTHX, d_out_BTHX], axis=2)
  chunk = _chunk_size(indices_BTN, query_BTHX.shape[-1])
  rows_BTN = _rows(indices_BTN, latent_BSC)
  queries = (both_BTYX, indices_BTN, rows_BTN, mean_BTH, lse_BTH)
  d_key_ZX, d_query_KQHX = lax.scan(
    step, jnp.zeros_like(key_ZX), tuple(_cut(chunk, a) for a in queries)
  )
  d_query_BTHX = scale * _uncut(d_query_KQHX, query_BTHX.shape)
  d_key_BSX = d_key_ZX.reshape(*latent_BSC.shape[:2], -1)
  return (
    d_query_BTHX[..., :latent].astype(query_latent_BTHC.dtype),
    d_query_BTHX[..., latent:].astype(query_rope_BTHR.dtype),
    d_key_BSX[..., :latent].astype(latent_BSC.dtype),
    d_key_BSX[..., latent:].astype(key_rope_BSR.dtype),
  )


def _chunk_size(indices_BTN, width):
  batch, queries, selected = indices_BTN.shape
  wanted = _CHUNK_BYTES // (4 * width * selected)
  return max(1, min(batch * queries, wanted))


def _flat(array_BSX):
  return array_BSX.reshape(-1, array_BSX.shape[-1])


def _join(left, right):
  """Joins along the last axis, as float32."""
  return jnp.concatenate(
    [left.astype(jnp.float32), right.astype(jnp.float32)], axis=-1
  )


def _rows(indices_BTN, latent_BSC):
  """Returns the rows of all the batch's keys; index -1 takes the first."""
  batch, keys, _ = latent_BSC.shape
  first_B = keys * jnp.arange(batch, dtype=indices_BTN.dtype)
  return first_B[:, None, None] + jnp.maximum(indices_BTN, 0)


def _gather(parts, row_QN):
  """Fetches rows [Q,N,X], float32, from key arrays that hold parts of X."""
  fetched = [jnp.take(part, row_QN, axis=0, mode="clip") for part in parts]
  return fetched[0] if len(fetched) == 1 else _join(*fetched)


def _products(query_QYX, key_QNX):
  """Returns [Q,Y,N]: the keys times the queries, in that order.

  The few queries of a key list make a narrow product; with the keys as rows it
  is half again as fast. The barrier keeps XLA from turning it round.
  """
  product_QNY = jnp.einsum("QNX,QYX->QNY", key_QNX, query_QYX)
  return jnp.swapaxes(lax.optimization_barrier(product_QNY), 1, 2)


def _cut(chunk, array_BTX):
  """Cuts [B,T,...] into chunks [K,Q,...], padded with zeros."""
  flat = array_BTX.reshape(-1, *array_BTX.shape[2:])
  missing = -flat.shape[0] % chunk
  padded = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
  return padded.reshape(-1, chunk, *flat.shape[1:])


def _uncut(array_KQX, shape):
  """Undoes `_cut`."""
  flat = array_KQX.reshape(-1, *array_KQX.shape[2:])
  return flat[: shape[0] * shape[1]].reshape(shape)
