"""Float64 numpy oracle: the whole model over a checkpoint's own tensors.

`config` is the dictionary of a released config.json, `tensors` maps Hugging
Face names to float64 arrays in their [out, in] layout. The captured arrays
are: index_scores (-inf outside the allowed pairs) and topk_mask [L, B, T, S];
experts [L, B, T, A], route_weights and affinity [L, B, T, E] of the MoE
layers; hidden_states [L + 1, B, T, D], attn_out and ffn_out [L, B, T, D];
final_norm [B, T, D], logits [B, T, W], attention_weights [L, B, T, H, S]; and
of layer 0 alone l0_qr, l0_q_pe, l0_k_pe, l0_kv_latent, l0_idx_q, l0_idx_k and
l0_idx_w.

Axes: B batch, T queries, S keys, L layers, D width, H heads, E experts, A
experts a token uses, W vocabulary, Y both halves of an MTP input.
"""

import numpy as np

from tests.support import oracle_blocks
from tests.support import oracle_layers
from tests.support import oracle_losses
from tests.support import oracle_ops


def forward(
  config,
  tensors,
  token_ids_BT,
  *,
  segment_ids_BT=None,
  positions_BT=None,
  sparse=True,
  selection_LBTS=None,
  routing=None,
  score_pairs=oracle_ops.index_scores,
  attend=oracle_layers.attention_expanded,
):
  """Runs the main model and returns every captured array by name.

  Args:
    config: a released config.json as a dictionary.
    tensors: Hugging Face names to float64 arrays.
    token_ids_BT: int [B, T].
    segment_ids_BT: documents of a packed batch; pairs across two are masked.
    positions_BT: 0 to T - 1 by default.
    sparse: False makes the main attention dense; the indexer still scores.
    selection_LBTS: replays a selection instead of the indexer's.
    routing: replays expert indices, one [B, T, A] a MoE layer.
    score_pairs: index_scores or index_scores_quantised.
    attend: attention_expanded or attention_absorbed.
  """
  batch, tokens = token_ids_BT.shape
  if positions_BT is None:
    positions_BT = np.broadcast_to(np.arange(tokens), (batch, tokens))
  allowed_BTS = oracle_ops.allowed_pairs(batch, tokens, segment_ids_BT)
  x_BTD = tensors["model.embed_tokens.weight"][token_ids_BT]
  hidden, layers = [x_BTD], []
  first_moe = config["first_k_dense_replace"]
  for layer in range(config["num_hidden_layers"]):
    replayed = routing is not None and layer >= first_moe
    x_BTD, captured = oracle_blocks.block(
      config,
      tensors,
      layer,
      x_BTD,
      experts_BTA=routing[layer - first_moe] if replayed else None,
      positions_BT=positions_BT,
      allowed_BTS=allowed_BTS,
      sparse=sparse,
      selection_BTS=None if selection_LBTS is None else selection_LBTS[layer],
      score_pairs=score_pairs,
      attend=attend,
    )
    hidden.append(x_BTD)
    layers.append(captured)
  final_BTD = oracle_ops.rms_norm(
    x_BTD, tensors["model.norm.weight"], config["rms_norm_eps"]
  )
  return {
    "hidden_states": np.stack(hidden),
    "final_norm": final_BTD,
    "logits": oracle_blocks.linear(tensors, "lm_head", final_BTD),
    **_stack_captured(layers),
  }


def _stack_captured(layers):
  """Stacks each captured array over the layers that have it."""
  per_layer = ("qr", "q_pe", "k_pe", "kv_latent", "idx_q", "idx_k", "idx_w")
  stacked = {"l0_" + name: layers[0][name] for name in per_layer}
  for name in dict.fromkeys(name for layer in layers for name in layer):
    if name not in per_layer:
      stacked[name] = np.stack([c[name] for c in layers if name in c])
  return stacked


def mtp_forward(
  config,
  tensors,
  final_norm_BTD,
  token_ids_BT,
  *,
  segment_ids_BT=None,
  positions_BT=None,
  sparse=True,
):
  """The MTP module: position i sees the normed hidden of i and token i + 1.

  Returns logits [B, T - 1, W] that predict token i + 2 (DeepSeek-V3, section
  2.2, depth 1) and the captured arrays of its layer.
  """
  batch, tokens = token_ids_BT.shape
  layer = config["num_hidden_layers"]
  prefix, epsilon = f"model.layers.{layer}.", config["rms_norm_eps"]
  embedding_BTD = tensors[prefix + "embed_tokens.weight"][token_ids_BT[:, 1:]]
  halves_BTY = np.concatenate(
    [
      oracle_ops.rms_norm(
        embedding_BTD, tensors[prefix + "enorm.weight"], epsilon
      ),
      oracle_ops.rms_norm(
        final_norm_BTD[:, :-1], tensors[prefix + "hnorm.weight"], epsilon
      ),
    ],
    axis=-1,
  )
  if positions_BT is None:
    positions_BT = np.broadcast_to(np.arange(tokens), (batch, tokens))
  if segment_ids_BT is not None:
    segment_ids_BT = segment_ids_BT[:, :-1]
  x_BTD, captured = oracle_blocks.block(
    config,
    tensors,
    layer,
    oracle_blocks.linear(tensors, prefix + "eh_proj", halves_BTY),
    positions_BT=positions_BT[:, :-1],
    allowed_BTS=oracle_ops.allowed_pairs(batch, tokens - 1, segment_ids_BT),
    sparse=sparse,
    selection_BTS=None,
    score_pairs=oracle_ops.index_scores,
    attend=oracle_layers.attention_expanded,
  )
  normed_BTD = oracle_ops.rms_norm(
    x_BTD, tensors[prefix + "shared_head.norm.weight"], epsilon
  )
  return oracle_blocks.linear(
    tensors, prefix + "shared_head.head", normed_BTD
  ), captured


def lm_loss(logits_BTW, token_ids_BT, segment_ids_BT=None):
  """Mean next-token cross-entropy over the positions that have a target."""
  target_BT, mask_BT = oracle_losses.shifted_targets(
    token_ids_BT, 1, segment_ids_BT
  )
  return oracle_losses.cross_entropy(
    logits_BTW, target_BT, mask_BT / mask_BT.sum()
  )


def mtp_loss(mtp_logits_BTW, token_ids_BT, segment_ids_BT=None):
  """Mean MTP cross-entropy; logits [B, T - 1, W], targets two tokens on."""
  target_BT, mask_BT = oracle_losses.shifted_targets(
    token_ids_BT, 2, segment_ids_BT
  )
  return oracle_losses.cross_entropy(
    mtp_logits_BTW, target_BT[:, :-1], mask_BT[:, :-1] / mask_BT.sum()
  )
