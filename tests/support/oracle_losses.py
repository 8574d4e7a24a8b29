"""Float64 numpy oracle: losses of the stages, each with its gradient.

Every loss is a sum of weight * term over tokens; the caller's weights decide
whether that is a sum or a mean. Axes: B batch, T queries, S keys, H heads, W
vocabulary.
"""

import numpy as np

from tests.support import oracle_ops


def shifted_targets(token_ids_BT, offset, segment_ids_BT=None):
  """Token at position t + offset as the target of position t.

  Returns targets [B, T] (0 where there is none) and a bool mask [B, T]: the
  target exists and every token from t to t + offset is of one document.
  """
  target_BT = np.zeros_like(token_ids_BT)
  target_BT[:, :-offset] = token_ids_BT[:, offset:]
  mask_BT = np.zeros(token_ids_BT.shape, bool)
  mask_BT[:, :-offset] = True
  if segment_ids_BT is not None:
    for step in range(1, offset + 1):
      same_BT = segment_ids_BT[:, step:] == segment_ids_BT[:, :-step]
      mask_BT[:, : same_BT.shape[1]] &= same_BT
  return target_BT, mask_BT


def cross_entropy(logits_BTW, target_BT, weight_BT):
  """Weighted sum of -log softmax(logits)[target] and its logit gradient.

  With offset-1 targets this is the language-model loss; with offset-2 targets
  and the MTP module's logits it is that module's loss (DeepSeek-V3, equation
  24, D = 1, without lambda).
  """
  everything_BTW = np.ones(logits_BTW.shape, bool)
  log_p_BTW = oracle_ops.masked_log_softmax(logits_BTW, everything_BTW)
  chosen_BT = np.take_along_axis(log_p_BTW, target_BT[..., None], -1)[..., 0]
  loss = -np.sum(weight_BT * chosen_BT)
  grad_BTW = np.exp(log_p_BTW)
  np.put_along_axis(
    grad_BTW,
    target_BT[..., None],
    np.take_along_axis(grad_BTW, target_BT[..., None], -1) - 1.0,
    -1,
  )
  return loss, grad_BTW * weight_BT[..., None]


def attention_target(weights_BTHS, mask_BTS):
  """Sums softmax weights over heads and L1-normalises them on the mask.

  This is p of DeepSeek-V3.2, section 2.1.1. Returns [B, T, S].
  """
  summed_BTS = np.where(mask_BTS, weights_BTHS.sum(axis=2), 0.0)
  total_BT1 = summed_BTS.sum(-1, keepdims=True)
  return summed_BTS / np.where(total_BT1 > 0, total_BT1, 1.0)


def indexer_kl(p_BTS, scores_BTS, mask_BTS, weight_BT):
  """Weighted sum of KL(p || softmax(scores)) over the mask, and its gradient.

  The mask is every allowed key in the dense warm-up (DeepSeek-V3.2, equation
  3) and the selected keys in sparse training (equation 4). The target p is a
  constant and sums to one on the mask of every row that has any key.

  Returns (loss, kl [B, T], gradient with respect to the scores [B, T, S]).
  """
  log_q_BTS = oracle_ops.masked_log_softmax(scores_BTS, mask_BTS)
  positive_BTS = mask_BTS & (p_BTS > 0)
  log_p_BTS = np.log(np.where(positive_BTS, p_BTS, 1.0))
  gap_BTS = log_p_BTS - np.where(positive_BTS, log_q_BTS, 0.0)
  kl_BT = np.sum(np.where(positive_BTS, p_BTS * gap_BTS, 0.0), axis=-1)
  grad_BTS = np.where(mask_BTS, np.exp(log_q_BTS) - p_BTS, 0.0)
  return np.sum(weight_BT * kl_BT), kl_BT, grad_BTS * weight_BT[..., None]


def indexer_kl_dense(weights_BTHS, scores_BTS, allowed_BTS, weight_BT):
  """Equation 3: the target is dense attention, the support all allowed keys."""
  p_BTS = attention_target(weights_BTHS, allowed_BTS)
  return indexer_kl(p_BTS, scores_BTS, allowed_BTS, weight_BT)


def indexer_kl_sparse(weights_BTHS, scores_BTS, selected_BTS, weight_BT):
  """Equation 4: target and support are restricted to the selected keys."""
  p_BTS = attention_target(weights_BTHS, selected_BTS)
  return indexer_kl(p_BTS, scores_BTS, selected_BTS, weight_BT)
