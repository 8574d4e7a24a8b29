"""Float64 numpy oracle: norms, rotary embedding, quantisation, selection.

Written from the equations of DeepSeek-V3, DeepSeek-V3.2 and YaRN and from the
published semantics of the released checkpoints, never from the JAX model that
it judges. Nothing here is fast, and nothing here imports jax.

Axes: B batch, T queries, S keys, I index heads, K index width, R rotary width,
P rotary pairs (R / 2), X any width, O output rows, Q blocks of 128 columns,
Z blocks of 128 rows, J selected slots, M 32-bit words. "..." stands for any
leading axes.
"""

import ml_dtypes
import numpy as np

FP8_MAX = 448.0
QUANT_BLOCK = 128


def rms_norm(x_X, scale_X, epsilon=1e-6):
  """Divides x [..., X] by its root mean square and multiplies by the scale."""
  mean_square_1 = np.mean(np.square(x_X), axis=-1, keepdims=True)
  return x_X / np.sqrt(mean_square_1 + epsilon) * scale_X


def layer_norm(x_X, scale_X, bias_X, epsilon=1e-6):
  """Standardises x [..., X] over its last axis, then scales and shifts it."""
  centred_X = x_X - np.mean(x_X, axis=-1, keepdims=True)
  variance_1 = np.mean(np.square(centred_X), axis=-1, keepdims=True)
  return centred_X / np.sqrt(variance_1 + epsilon) * scale_X + bias_X


def silu(x_X):
  """Returns x * sigmoid(x), without overflow for large negative x."""
  return x_X * sigmoid(x_X)


def sigmoid(x_X):
  """Returns 1 / (1 + exp(-x)) from an exponential that never overflows."""
  decay_X = np.exp(-np.abs(x_X))
  return np.where(x_X >= 0, 1.0, decay_X) / (1.0 + decay_X)


def masked_log_softmax(x_S, mask_S):
  """Log-softmax of x [..., S] over the true entries of the mask.

  Entries outside the mask come back as -inf; a row without any entry is -inf
  throughout.
  """
  kept_S = np.where(mask_S, x_S, -np.inf)
  peak_1 = np.max(kept_S, axis=-1, keepdims=True)
  peak_1 = np.where(np.isfinite(peak_1), peak_1, 0.0)
  total_1 = np.sum(np.exp(kept_S - peak_1), axis=-1, keepdims=True)
  log_total_1 = np.log(np.where(total_1 > 0, total_1, 1.0))
  return kept_S - peak_1 - log_total_1


def masked_softmax(x_S, mask_S):
  """Softmax of x [..., S] over the true entries of the mask, zero elsewhere."""
  return np.exp(masked_log_softmax(x_S, mask_S))


def yarn_bounds(width, *, theta, original_length, beta_fast, beta_slow):
  """The first and the last rotary pair of YaRN's ramp (YaRN, section 3.2)."""

  def pair_of(rotations):
    turns = original_length / (2.0 * np.pi * rotations)
    return width * np.log(turns) / (2.0 * np.log(theta))

  low = max(int(np.floor(pair_of(beta_fast))), 0)
  high = min(int(np.ceil(pair_of(beta_slow))), width - 1)
  return low, high


def yarn_frequencies(
  width, *, theta, factor, original_length, beta_fast, beta_slow
):
  """Rotary frequencies [P] in radians a position; factor 1 is plain RoPE."""
  pair_P = np.arange(width // 2, dtype=np.float64)
  plain_P = theta ** (-2.0 * pair_P / width)
  low, high = yarn_bounds(
    width,
    theta=theta,
    original_length=original_length,
    beta_fast=beta_fast,
    beta_slow=beta_slow,
  )
  ramp_P = np.clip((pair_P - low) / max(high - low, 0.001), 0.0, 1.0)
  return plain_P / factor * ramp_P + plain_P * (1.0 - ramp_P)


def attention_scale(key_width, *, factor, mscale=1.0):
  """Softmax scale: key_width^-0.5 times YaRN's squared temperature."""
  temperature = 0.1 * mscale * np.log(max(factor, 1.0)) + 1.0
  return key_width**-0.5 * temperature**2


def rope_interleaved(x_R, angle_P):
  """Rotates the pairs (x[2i], x[2i+1]) of x [..., R] by angles [..., P]."""
  even_P, odd_P = x_R[..., 0::2], x_R[..., 1::2]
  out_R = np.empty_like(x_R)
  out_R[..., 0::2] = even_P * np.cos(angle_P) - odd_P * np.sin(angle_P)
  out_R[..., 1::2] = even_P * np.sin(angle_P) + odd_P * np.cos(angle_P)
  return out_R


def rope_half_split(x_R, angle_P):
  """Rotates the pairs (x[i], x[i + R/2]) of x [..., R] by angles [..., P]."""
  pairs = x_R.shape[-1] // 2
  first_P, second_P = x_R[..., :pairs], x_R[..., pairs:]
  return np.concatenate(
    [
      first_P * np.cos(angle_P) - second_P * np.sin(angle_P),
      first_P * np.sin(angle_P) + second_P * np.cos(angle_P),
    ],
    axis=-1,
  )


def hadamard(x_K):
  """Orthonormal Walsh-Hadamard transform of x [..., K], natural order."""
  width = x_K.shape[-1]
  assert width & (width - 1) == 0, width
  row_K = np.arange(width)
  common_KK = row_K[:, None] & row_K[None, :]
  parity_KK = np.zeros_like(common_KK)
  while common_KK.any():
    parity_KK ^= common_KK & 1
    common_KK = common_KK >> 1
  return x_K @ (1.0 - 2.0 * parity_KK) / np.sqrt(width)


def act_quant(x_X, *, block=QUANT_BLOCK, power_of_two=True):
  """Quantises rows of x [..., X] to e4m3 in blocks of consecutive columns.

  The arithmetic is float32, because the official kernel's is and the rounding
  depends on it. The scale is amax * (1 / 448) with amax at least 1e-4, rounded
  up to a power of two if power_of_two (ue8m0).

  Returns values [..., X] float8_e4m3fn and scales [..., X / block] float32.
  """
  blocks = x_X.shape[-1] // block
  assert blocks * block == x_X.shape[-1], (x_X.shape, block)
  tiles_QX = x_X.astype(np.float32).reshape(*x_X.shape[:-1], blocks, block)
  amax_Q1 = np.max(np.abs(tiles_QX), axis=-1, keepdims=True)
  amax_Q1 = np.maximum(amax_Q1, np.float32(1e-4))
  scale_Q1 = amax_Q1 * np.float32(1.0 / FP8_MAX)
  if power_of_two:
    mantissa_Q1, exponent_Q1 = np.frexp(scale_Q1)
    exponent_Q1 = exponent_Q1 - (mantissa_Q1 == 0.5)
    scale_Q1 = np.ldexp(np.float32(1.0), exponent_Q1).astype(np.float32)
  clipped_QX = np.clip(tiles_QX / scale_Q1, -FP8_MAX, FP8_MAX)
  values_X = clipped_QX.astype(ml_dtypes.float8_e4m3fn).reshape(x_X.shape)
  return values_X, scale_Q1[..., 0]


def dequantise_rows(values_X, scale_Q):
  """Undoes act_quant: e4m3 values [..., X] times scales [..., Q], float64."""
  block = values_X.shape[-1] // scale_Q.shape[-1]
  return values_X.astype(np.float64) * np.repeat(
    scale_Q.astype(np.float64), block, axis=-1
  )


def dequantise_weight(values_OX, scale_ZQ):
  """Undoes 128 x 128 block scaling; the last blocks may be partial."""
  rows, columns = values_OX.shape
  scale_OX = np.repeat(
    np.repeat(scale_ZQ.astype(np.float64), QUANT_BLOCK, axis=0)[:rows],
    QUANT_BLOCK,
    axis=1,
  )[:, :columns]
  return values_OX.astype(np.float64) * scale_OX


def index_scores(q_BTIK, k_BSK, weight_BTI):
  """Index score of every pair (DeepSeek-V3.2, equation 1).

  The weights carry the factors I^-0.5 and K^-0.5 already.

  Returns scores [B, T, S].
  """
  logits_BTIS = np.einsum("BTIK,BSK->BTIS", q_BTIK, k_BSK)
  return np.einsum("BTIS,BTI->BTS", np.maximum(logits_BTIS, 0.0), weight_BTI)


def index_scores_fp8(q_BTIK, k_BSK, weight_BTI):
  """index_scores as the fp8 kernel computes it, all sums exact.

  Queries and keys pass act_quant with one ue8m0 scale a row; the query's scale
  joins the head weight and the key's comes last.
  """
  q8_BTIK, q_scale_BTI1 = act_quant(q_BTIK, block=q_BTIK.shape[-1])
  k8_BSK, k_scale_BS1 = act_quant(k_BSK, block=k_BSK.shape[-1])
  scores_BTS = index_scores(
    q8_BTIK.astype(np.float64),
    k8_BSK.astype(np.float64),
    weight_BTI * q_scale_BTI1[..., 0],
  )
  return scores_BTS * k_scale_BS1[:, None, :, 0]


def index_scores_quantised(q_BTIK, k_BSK, weight_BTI):
  """index_scores_fp8 of Hadamard-transformed queries and keys."""
  return index_scores_fp8(hadamard(q_BTIK), hadamard(k_BSK), weight_BTI)


def index_scores_backward(grad_BTS, q_BTIK, k_BSK, weight_BTI):
  """Gradients of index_scores with respect to q, k and the head weights."""
  logits_BTIS = np.einsum("BTIK,BSK->BTIS", q_BTIK, k_BSK)
  grad_weight_BTI = np.einsum(
    "BTS,BTIS->BTI", grad_BTS, np.maximum(logits_BTIS, 0.0)
  )
  grad_logits_BTIS = np.einsum(
    "BTS,BTI,BTIS->BTIS", grad_BTS, weight_BTI, logits_BTIS > 0
  )
  grad_q_BTIK = np.einsum("BTIS,BSK->BTIK", grad_logits_BTIS, k_BSK)
  grad_k_BSK = np.einsum("BTIS,BTIK->BSK", grad_logits_BTIS, q_BTIK)
  return grad_q_BTIK, grad_k_BSK, grad_weight_BTI


def allowed_pairs(batch, length, segment_ids_BT=None):
  """Pairs [B, T, S] that causality and document boundaries allow."""
  causal_TS = np.tril(np.ones((length, length), bool))
  allowed_BTS = np.broadcast_to(causal_TS, (batch, length, length))
  if segment_ids_BT is None:
    return allowed_BTS
  same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  return allowed_BTS & same_BTS


def select_top_k(scores_BTS, allowed_BTS, top_k):
  """The top_k best allowed keys of every query as a mask [B, T, S].

  Ties go to the lowest index, and -0.0 counts as 0.0. A query with at most
  top_k allowed keys keeps all of them.
  """
  ranked_BTS = np.where(allowed_BTS, scores_BTS, -np.inf)
  # A stable sort keeps equal scores in index order, and -0.0 == 0.0 in it.
  order_BTS = np.argsort(-ranked_BTS, axis=-1, kind="stable")
  selected_BTS = np.zeros(allowed_BTS.shape, bool)
  np.put_along_axis(selected_BTS, order_BTS[..., :top_k], True, axis=-1)
  return selected_BTS & allowed_BTS


def mask_to_indices(mask_BTS, top_k):
  """Selected keys in ascending order, int32 [B, T, J], padded with -1."""
  batch, queries, _ = mask_BTS.shape
  indices_BTJ = np.full((batch, queries, top_k), -1, np.int32)
  for b in range(batch):
    for t in range(queries):
      keys_J = np.flatnonzero(mask_BTS[b, t])
      indices_BTJ[b, t, : len(keys_J)] = keys_J
  return indices_BTJ


def mask_to_bits(mask_BTS):
  """Packs a mask: key s is bit s % 32 of word s // 32, uint32 [B, T, M]."""
  batch, queries, keys = mask_BTS.shape
  words = -(-keys // 32)
  bits_BTM = np.zeros((batch, queries, words), np.uint32)
  for s in range(keys):
    bit_BT = mask_BTS[:, :, s].astype(np.uint32) << np.uint32(s % 32)
    bits_BTM[:, :, s // 32] |= bit_BT
  return bits_BTM


def selections_agree(scores_BTS, mask_BTS, other_BTS, allowed_BTS, top_k):
  """Whether two selections differ only where rounding may decide, [B, T].

  A row agrees if both sides keep the same number of keys and every key of one
  side alone scores within 1e-5 of the row's largest |score| from the k-th
  score.
  """
  ranked_BTS = np.where(allowed_BTS, scores_BTS, -np.inf)
  kept = min(top_k, scores_BTS.shape[-1])
  kth_BT1 = -np.sort(-ranked_BTS, axis=-1)[..., kept - 1 : kept]
  peak_BT1 = np.max(
    np.where(allowed_BTS, np.abs(scores_BTS), 0.0), axis=-1, keepdims=True
  )
  # A row with fewer than k allowed keys has no k-th score to be near to.
  kth_BT1 = np.where(np.isfinite(kth_BT1), kth_BT1, np.inf)
  gap_BTS = np.abs(np.where(allowed_BTS, scores_BTS, 0.0) - kth_BT1)
  near_BTS = gap_BTS <= 1e-5 * peak_BT1
  unexplained_BTS = (mask_BTS != other_BTS) & ~(near_BTS & allowed_BTS)
  same_count_BT = mask_BTS.sum(-1) == other_BTS.sum(-1)
  return same_count_BT & ~unexplained_BTS.any(-1)
