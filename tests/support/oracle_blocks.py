"""Float64 numpy oracle: one transformer layer over a checkpoint's tensors.

`config` is the dictionary of a released config.json, `tensors` maps Hugging
Face names to float64 arrays in their [out, in] layout.

Axes: B batch, T queries, S keys, D width, U query latent, C latent, H heads, N
nope width, R rotary width, P rotary pairs, V value width, I index heads, K
index width, E experts, A experts a token uses, X any other width.
"""

import numpy as np

from tests.support import oracle_layers
from tests.support import oracle_ops


def rope_angles(config, positions_BT):
  """Angles [B, T, P] of a rope_scaling of None or of type yarn.

  The released configs set mscale equal to mscale_all_dim, so that cosines and
  sines carry no factor; any other config is refused.
  """
  scaling = config.get("rope_scaling") or {"factor": 1.0}
  if scaling.get("mscale", 1.0) != scaling.get("mscale_all_dim", 1.0):
    raise ValueError(f"{scaling=} has two different mscale values")
  frequency_P = oracle_ops.yarn_frequencies(
    config["qk_rope_head_dim"],
    theta=config["rope_theta"],
    factor=scaling["factor"],
    original_length=scaling.get("original_max_position_embeddings", 4096),
    beta_fast=scaling.get("beta_fast", 32),
    beta_slow=scaling.get("beta_slow", 1),
  )
  return positions_BT[..., None].astype(np.float64) * frequency_P


def softmax_scale(config):
  """Softmax scale of the main attention, YaRN's temperature included."""
  scaling = config.get("rope_scaling") or {"factor": 1.0}
  return oracle_ops.attention_scale(
    config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
    factor=scaling["factor"],
    mscale=scaling.get("mscale_all_dim", 1.0),
  )


def linear(tensors, name, x_BTD):
  """Applies the bias-free projection `name`.weight, stored [out, in]."""
  return x_BTD @ tensors[name + ".weight"].T


def indexer_inputs(config, tensors, prefix, x_BTD, q_latent_BTU, angle_BTP):
  """The indexer's queries, keys and head weights from one layer's input.

  Queries and keys are [rope | nope], rotated in the half-split layout, before
  any Hadamard transform. The weights carry I^-0.5 but not K^-0.5.
  """
  heads, rope = config["index_n_heads"], config["qk_rope_head_dim"]
  batch, tokens, _ = x_BTD.shape
  q_BTIK = linear(tensors, prefix + "wq_b", q_latent_BTU)
  q_BTIK = q_BTIK.reshape(batch, tokens, heads, -1)
  k_BTK = oracle_ops.layer_norm(
    linear(tensors, prefix + "wk", x_BTD),
    tensors[prefix + "k_norm.weight"],
    tensors[prefix + "k_norm.bias"],
  )
  rotate = oracle_ops.rope_half_split
  q_rope_BTIR = rotate(q_BTIK[..., :rope], angle_BTP[:, :, None])
  k_rope_BTR = rotate(k_BTK[..., :rope], angle_BTP)
  weight_BTI = linear(tensors, prefix + "weights_proj", x_BTD) * heads**-0.5
  return (
    np.concatenate([q_rope_BTIR, q_BTIK[..., rope:]], axis=-1),
    np.concatenate([k_rope_BTR, k_BTK[..., rope:]], axis=-1),
    weight_BTI,
  )


def mla_inputs(config, tensors, prefix, x_BTD, angle_BTP):
  """Query latent, rotated queries, latent, rotated key and up-projections."""
  heads, rope = config["num_attention_heads"], config["qk_rope_head_dim"]
  nope, latent = config["qk_nope_head_dim"], config["kv_lora_rank"]
  epsilon = config["rms_norm_eps"]
  batch, tokens, _ = x_BTD.shape
  q_latent_BTU = oracle_ops.rms_norm(
    linear(tensors, prefix + "q_a_proj", x_BTD),
    tensors[prefix + "q_a_layernorm.weight"],
    epsilon,
  )
  q_BTHX = linear(tensors, prefix + "q_b_proj", q_latent_BTU)
  q_BTHX = q_BTHX.reshape(batch, tokens, heads, nope + rope)
  down_BTX = linear(tensors, prefix + "kv_a_proj_with_mqa", x_BTD)
  latent_BTC = oracle_ops.rms_norm(
    down_BTX[..., :latent], tensors[prefix + "kv_a_layernorm.weight"], epsilon
  )
  up_HXC = tensors[prefix + "kv_b_proj.weight"].reshape(heads, -1, latent)
  rotate = oracle_ops.rope_interleaved
  return {
    "q_latent": q_latent_BTU,
    "q_nope": q_BTHX[..., :nope],
    "q_rope": rotate(q_BTHX[..., nope:], angle_BTP[:, :, None]),
    "latent": latent_BTC,
    "k_rope": rotate(down_BTX[..., latent:], angle_BTP),
    "key_up": np.transpose(up_HXC[:, :nope], (2, 0, 1)),
    "value_up": np.transpose(up_HXC[:, nope:], (2, 0, 1)),
  }


def attention(
  config,
  tensors,
  prefix,
  x_BTD,
  positions_BT,
  allowed_BTS,
  *,
  sparse,
  selection_BTS,
  score_pairs,
  attend,
):
  """One attention layer, indexer and output projection included.

  Returns [B, T, D] and the layer's captured arrays.
  """
  angle_BTP = rope_angles(config, positions_BT)
  mla = mla_inputs(config, tensors, prefix, x_BTD, angle_BTP)
  idx_q_BTIK, idx_k_BTK, idx_w_BTI = indexer_inputs(
    config, tensors, prefix + "indexer.", x_BTD, mla["q_latent"], angle_BTP
  )
  scores_BTS = score_pairs(
    idx_q_BTIK, idx_k_BTK, idx_w_BTI * config["index_head_dim"] ** -0.5
  )
  if selection_BTS is None:
    selection_BTS = oracle_ops.select_top_k(
      scores_BTS, allowed_BTS, config["index_topk"]
    )
  out_BTHV, weights_BTHS = attend(
    mla["q_nope"],
    mla["q_rope"],
    mla["latent"],
    mla["k_rope"],
    mla["key_up"],
    mla["value_up"],
    selection_BTS if sparse else allowed_BTS,
    softmax_scale(config),
  )
  out_BTD = linear(
    tensors, prefix + "o_proj", out_BTHV.reshape(*x_BTD.shape[:2], -1)
  )
  return out_BTD, {
    "index_scores": np.where(allowed_BTS, scores_BTS, -np.inf),
    "topk_mask": selection_BTS,
    "attention_weights": weights_BTHS,
    "attn_out": out_BTD,
    "qr": mla["q_latent"],
    "q_pe": mla["q_rope"],
    "k_pe": mla["k_rope"],
    "kv_latent": mla["latent"],
    "idx_q": idx_q_BTIK,
    "idx_k": idx_k_BTK,
    "idx_w": idx_w_BTI,
  }


def mlp(tensors, prefix, x_BTD):
  """A SwiGLU with projections gate_proj, up_proj and down_proj."""
  return oracle_layers.swiglu(
    x_BTD,
    tensors[prefix + "gate_proj.weight"].T,
    tensors[prefix + "up_proj.weight"].T,
    tensors[prefix + "down_proj.weight"].T,
  )


def moe(config, tensors, prefix, x_BTD, experts_BTA=None):
  """Routed and shared experts; experts_BTA replays a routing.

  Returns [B, T, D] and the captured routing.
  """
  affinity_BTE = oracle_layers.router_affinity(
    x_BTD, tensors[prefix + "gate.weight"].T
  )
  if experts_BTA is None:
    experts_BTA = oracle_layers.select_experts(
      affinity_BTE,
      tensors[prefix + "gate.e_score_correction_bias"],
      num_groups=config["n_group"],
      groups_kept=config["topk_group"],
      experts_per_token=config["num_experts_per_tok"],
    )
  weights_BTE = oracle_layers.combine_weights(
    affinity_BTE,
    experts_BTA,
    normalize=config["norm_topk_prob"],
    routed_scale=config["routed_scaling_factor"],
  )
  stacked = [
    np.stack(
      [
        tensors[f"{prefix}experts.{expert}.{part}_proj.weight"].T
        for expert in range(config["n_routed_experts"])
      ]
    )
    for part in ("gate", "up", "down")
  ]
  routed_BTD = oracle_layers.mixture(x_BTD, weights_BTE, *stacked)
  shared_BTD = mlp(tensors, prefix + "shared_experts.", x_BTD)
  return routed_BTD + shared_BTD, {
    "experts": experts_BTA,
    "route_weights": weights_BTE,
    "affinity": affinity_BTE,
  }


def block(config, tensors, layer, x_BTD, *, experts_BTA=None, **attention_args):
  """One pre-norm layer. Returns the residual stream and captured arrays."""
  prefix, epsilon = f"model.layers.{layer}.", config["rms_norm_eps"]
  attended_BTD, captured = attention(
    config,
    tensors,
    prefix + "self_attn.",
    oracle_ops.rms_norm(
      x_BTD, tensors[prefix + "input_layernorm.weight"], epsilon
    ),
    **attention_args,
  )
  middle_BTD = x_BTD + attended_BTD
  normed_BTD = oracle_ops.rms_norm(
    middle_BTD, tensors[prefix + "post_attention_layernorm.weight"], epsilon
  )
  if layer < config["first_k_dense_replace"]:
    ffn_BTD = mlp(tensors, prefix + "mlp.", normed_BTD)
  else:
    ffn_BTD, routing = moe(
      config, tensors, prefix + "mlp.", normed_BTD, experts_BTA
    )
    captured |= routing
  return middle_BTD + ffn_BTD, captured | {"ffn_out": ffn_BTD}
