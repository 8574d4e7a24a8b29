"""Float64 numpy oracle: attention, experts and router as plain functions.

Axes: B batch, T queries, S keys, H heads, N nope width, R rotary width, C
latent, V value width, D width, F expert width, E experts, G expert groups, X
experts of a group, A experts a token uses.
"""

import numpy as np

from tests.support import oracle_ops


def attention_expanded(
  q_nope_BTHN,
  q_rope_BTHR,
  latent_BSC,
  k_rope_BSR,
  key_up_CHN,
  value_up_CHV,
  mask_BTS,
  scale,
):
  """MLA in MHA form: keys and values are expanded from the latent per head.

  Returns the head outputs [B, T, H, V] and the softmax weights [B, T, H, S].
  """
  k_nope_BSHN = np.einsum("BSC,CHN->BSHN", latent_BSC, key_up_CHN)
  value_BSHV = np.einsum("BSC,CHV->BSHV", latent_BSC, value_up_CHV)
  scores_BTHS = np.einsum("BTHN,BSHN->BTHS", q_nope_BTHN, k_nope_BSHN)
  scores_BTHS += np.einsum("BTHR,BSR->BTHS", q_rope_BTHR, k_rope_BSR)
  weights_BTHS = oracle_ops.masked_softmax(
    scores_BTHS * scale, mask_BTS[:, :, None, :]
  )
  return np.einsum("BTHS,BSHV->BTHV", weights_BTHS, value_BSHV), weights_BTHS


def attention_absorbed(
  q_nope_BTHN,
  q_rope_BTHR,
  latent_BSC,
  k_rope_BSR,
  key_up_CHN,
  value_up_CHV,
  mask_BTS,
  scale,
):
  """MLA in MQA form: every head attends to the latent itself.

  Returns what attention_expanded returns.
  """
  q_latent_BTHC = np.einsum("BTHN,CHN->BTHC", q_nope_BTHN, key_up_CHN)
  scores_BTHS = np.einsum("BTHC,BSC->BTHS", q_latent_BTHC, latent_BSC)
  scores_BTHS += np.einsum("BTHR,BSR->BTHS", q_rope_BTHR, k_rope_BSR)
  weights_BTHS = oracle_ops.masked_softmax(
    scores_BTHS * scale, mask_BTS[:, :, None, :]
  )
  out_latent_BTHC = np.einsum("BTHS,BSC->BTHC", weights_BTHS, latent_BSC)
  out_BTHV = np.einsum("BTHC,CHV->BTHV", out_latent_BTHC, value_up_CHV)
  return out_BTHV, weights_BTHS


def swiglu(x_BTD, gate_DF, up_DF, down_FD):
  """Down-projection of silu(x gate) * (x up), [B, T, D]."""
  hidden_BTF = oracle_ops.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)
  return hidden_BTF @ down_FD


def router_affinity(x_BTD, router_DE):
  """Sigmoid affinity of every token to every expert, [B, T, E]."""
  return oracle_ops.sigmoid(x_BTD @ router_DE)


def select_experts(
  affinity_BTE, bias_E, *, num_groups, groups_kept, experts_per_token
):
  """Chooses experts by affinity plus bias among the best groups of experts.

  A group's score is the sum of its two best biased affinities; experts of the
  other groups cannot be chosen. Ties go to the lowest index.

  Returns expert indices [B, T, A], best first.
  """
  biased_BTE = affinity_BTE + bias_E
  batch, tokens, experts = biased_BTE.shape
  grouped_BTGX = biased_BTE.reshape(batch, tokens, num_groups, -1)
  best_two_BTGX = -np.sort(-grouped_BTGX, axis=-1)[..., :2]
  group_score_BTG = best_two_BTGX.sum(-1)
  group_order_BTG = np.argsort(-group_score_BTG, axis=-1, kind="stable")
  kept_BTG = np.zeros(group_score_BTG.shape, bool)
  np.put_along_axis(kept_BTG, group_order_BTG[..., :groups_kept], True, -1)
  kept_BTE = np.repeat(kept_BTG, experts // num_groups, axis=-1)
  limited_BTE = np.where(kept_BTE, biased_BTE, -np.inf)
  order_BTE = np.argsort(-limited_BTE, axis=-1, kind="stable")
  return order_BTE[..., :experts_per_token]


def combine_weights(affinity_BTE, experts_BTA, *, normalize, routed_scale):
  """Dense combine weights [B, T, E] from the unbiased affinities."""
  chosen_BTA = np.take_along_axis(affinity_BTE, experts_BTA, axis=-1)
  if normalize:
    chosen_BTA = chosen_BTA / chosen_BTA.sum(-1, keepdims=True)
  weights_BTE = np.zeros_like(affinity_BTE)
  np.put_along_axis(weights_BTE, experts_BTA, chosen_BTA * routed_scale, -1)
  return weights_BTE


def mixture(x_BTD, weights_BTE, gate_EDF, up_EDF, down_EFD):
  """Sums the experts' outputs by their combine weights; no token drops."""
  out_BTD = np.zeros_like(x_BTD)
  for expert in range(weights_BTE.shape[-1]):
    y_BTD = swiglu(x_BTD, gate_EDF[expert], up_EDF[expert], down_EFD[expert])
    out_BTD += weights_BTE[..., expert, None] * y_BTD
  return out_BTD


def expert_load(experts_BTA, num_experts, token_mask_BT=None):
  """How many counted tokens each expert receives, [E]."""
  load_E = np.zeros(num_experts)
  for b, t in np.ndindex(experts_BTA.shape[:2]):
    if token_mask_BT is None or token_mask_BT[b, t]:
      load_E[experts_BTA[b, t]] += 1.0
  return load_E


def update_router_bias(bias_E, load_E, rate):
  """Moves the bias of overloaded experts down by rate, of idle ones up."""
  return bias_E + rate * np.sign(load_E.mean() - load_E)


def balance_loss(affinity_BTE, experts_BTA, token_mask_BT=None):
  """Sequence-wise balance loss without its factor alpha, [B].

  The sum over experts of f_i P_i (DeepSeek-V3, section 2.1.2): f_i is the
  fraction of the sequence's slots that expert i got, times E; P_i its mean
  normalised affinity. Masked tokens do not count; a sequence without any
  token gives 0.
  """
  batch, tokens, experts = affinity_BTE.shape
  slots = experts_BTA.shape[-1]
  if token_mask_BT is None:
    token_mask_BT = np.ones((batch, tokens), bool)
  loss_B = np.zeros(batch)
  for b in range(batch):
    count = int(token_mask_BT[b].sum())
    if count == 0:
      continue
    load_E = expert_load(
      experts_BTA[b : b + 1], experts, token_mask_BT[b : b + 1]
    )
    fraction_E = experts * load_E / (slots * count)
    share_TE = affinity_BTE[b] / affinity_BTE[b].sum(-1, keepdims=True)
    loss_B[b] = np.sum(fraction_E * share_TE[token_mask_BT[b]].mean(0))
  return loss_B
