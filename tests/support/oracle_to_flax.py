"""Puts an oracle checkpoint into a Transformer, independently of the loader.

A leaf of the model is made of Hugging Face tensors by stacking: over layers
where blocks are stacked, and over experts. Shapes are in the order of the
model: D width, U query latent, C latent, H heads, N nope width, R rotary
width, V value width, I index heads, K index width, E experts, F hidden width.
"""

from typing import NamedTuple

from flax import nnx
import jax.numpy as jnp
import numpy as np

from dsv32_jax.model import config as config_lib
from dsv32_jax.model import transformer


class Leaf(NamedTuple):
  """Where one layer's share of a parameter comes from.

  Attributes:
    path: of the parameter in the model.
    layer: index on its leading layer axis, or None if it is not stacked.
    names: Hugging Face tensors; several are stacked as experts.
    convert: one tensor, as stored, to the model's axes.
  """

  path: tuple[str, ...]
  layer: int | None
  names: tuple[str, ...]
  convert: object

  def value(self, tensors):
    """The leaf's float64 array for one layer."""
    arrays = [self.convert(tensors[name]) for name in self.names]
    return np.stack(arrays) if len(arrays) > 1 else arrays[0]


def model_config(config) -> config_lib.ModelConfig:
  """The ModelConfig of a config.json dictionary with rope_scaling or None."""
  scaling = config["rope_scaling"] or {"factor": 1.0}
  return config_lib.ModelConfig(
    vocab_size=config["vocab_size"],
    width=config["hidden_size"],
    num_layers=config["num_hidden_layers"],
    num_dense_layers=config["first_k_dense_replace"],
    ffn_width=config["intermediate_size"],
    expert_width=config["moe_intermediate_size"],
    num_heads=config["num_attention_heads"],
    query_latent_width=config["q_lora_rank"],
    latent_width=config["kv_lora_rank"],
    nope_width=config["qk_nope_head_dim"],
    rope_width=config["qk_rope_head_dim"],
    value_width=config["v_head_dim"],
    num_experts=config["n_routed_experts"],
    num_shared_experts=config["n_shared_experts"],
    experts_per_token=config["num_experts_per_tok"],
    num_expert_groups=config["n_group"],
    expert_groups_kept=config["topk_group"],
    normalize_expert_weights=config["norm_topk_prob"],
    routed_scale=config["routed_scaling_factor"],
    index_heads=config["index_n_heads"],
    index_width=config["index_head_dim"],
    index_top_k=config["index_topk"],
    norm_epsilon=config["rms_norm_eps"],
    rope=config_lib.RopeConfig(
      theta=config["rope_theta"],
      factor=scaling["factor"],
      original_length=scaling.get("original_max_position_embeddings", 4096),
      beta_fast=scaling.get("beta_fast", 32.0),
      beta_slow=scaling.get("beta_slow", 1.0),
    ),
    max_length=config["max_position_embeddings"],
    num_mtp_layers=config["num_nextn_predict_layers"],
    initializer_scale=config["initializer_range"],
    bos_id=config["bos_token_id"],
    eos_id=config["eos_token_id"],
  )


def _same(x):
  return x


def _transposed(x_OX):
  return x_OX.T


def _attention_leaves(config):
  heads, value = config["num_attention_heads"], config["v_head_dim"]
  nope, index = config["qk_nope_head_dim"], config["index_n_heads"]

  def per_head(count, begin=None, end=None):
    def convert(x_OX):
      x_HOX = x_OX.reshape(count, -1, x_OX.shape[-1])[:, begin:end]
      return np.transpose(x_HOX, (2, 0, 1))

    return convert

  def output(x_DX):
    return np.transpose(x_DX.reshape(-1, heads, value), (1, 2, 0))

  return {
    "query_down": ("q_a_proj.weight", _transposed),
    "query_norm.scale": ("q_a_layernorm.weight", _same),
    "query_up": ("q_b_proj.weight", per_head(heads)),
    "latent_down": ("kv_a_proj_with_mqa.weight", _transposed),
    "latent_norm.scale": ("kv_a_layernorm.weight", _same),
    "key_up": ("kv_b_proj.weight", per_head(heads, 0, nope)),
    "value_up": ("kv_b_proj.weight", per_head(heads, nope)),
    "output": ("o_proj.weight", output),
    "indexer.query": ("indexer.wq_b.weight", per_head(index)),
    "indexer.key": ("indexer.wk.weight", _transposed),
    "indexer.key_norm.scale": ("indexer.k_norm.weight", _same),
    "indexer.key_norm.bias": ("indexer.k_norm.bias", _same),
    "indexer.weight": ("indexer.weights_proj.weight", _transposed),
  }


def _block_leaves(config, number, path, layer):
  """Yields the leaves of Hugging Face layer `number` below `path`."""
  prefix = f"model.layers.{number}."

  def leaf(name, tensors, convert):
    full = (*path, *name.split("."))
    return Leaf(full, layer, tuple(prefix + t for t in tensors), convert)

  yield leaf("attention_norm.scale", ["input_layernorm.weight"], _same)
  yield leaf("ffn_norm.scale", ["post_attention_layernorm.weight"], _same)
  for name, (tensor, convert) in _attention_leaves(config).items():
    yield leaf("attention." + name, ["self_attn." + tensor], convert)
  is_moe = number >= config["first_k_dense_replace"]
  if is_moe:
    bias = "mlp.gate.e_score_correction_bias"
    yield leaf("ffn.router", ["mlp.gate.weight"], _transposed)
    yield leaf("ffn.expert_bias", [bias], _same)
  experts = range(config["n_routed_experts"])
  for part in ("gate", "up", "down"):
    weight = f"{part}_proj.weight"
    if not is_moe:
      yield leaf("ffn." + part, ["mlp." + weight], _transposed)
      continue
    shared = "mlp.shared_experts." + weight
    yield leaf("ffn.shared." + part, [shared], _transposed)
    names = [f"mlp.experts.{expert}.{weight}" for expert in experts]
    yield leaf("ffn." + part, names, _transposed)


def leaves(config):
  """Yields every Leaf of the model of a config.json dictionary."""
  yield Leaf(("embed", "table"), None, ("model.embed_tokens.weight",), _same)
  yield Leaf(("final_norm", "scale"), None, ("model.norm.weight",), _same)
  yield Leaf(("head", "kernel"), None, ("lm_head.weight",), _transposed)
  dense, count = config["first_k_dense_replace"], config["num_hidden_layers"]
  for number in range(count):
    stack = "dense_layers" if number < dense else "moe_layers"
    layer = number if number < dense else number - dense
    yield from _block_leaves(config, number, (stack,), layer)
  if config["num_nextn_predict_layers"]:
    prefix = f"model.layers.{count}."
    for name, tensor, convert in (
      ("embedding_norm.scale", "enorm.weight", _same),
      ("hidden_norm.scale", "hnorm.weight", _same),
      ("projection", "eh_proj.weight", _transposed),
      ("final_norm.scale", "shared_head.norm.weight", _same),
    ):
      path = ("mtp", *name.split("."))
      yield Leaf(path, None, (prefix + tensor,), convert)
    yield from _block_leaves(config, count, ("mtp", "block"), None)


def build(config, tensors) -> transformer.Transformer:
  """A float32 Transformer with an oracle checkpoint's values.

  Every variable of the model must get its value from exactly one place.
  """
  # Described, not initialised: drawing weights compiles for many seconds.
  model = nnx.eval_shape(
    lambda: transformer.Transformer(model_config(config), rngs=nnx.Rngs(0))
  )
  graph, state = nnx.split(model)
  values = {}
  for leaf in leaves(config):
    values.setdefault(leaf.path, []).append(leaf.value(tensors))
    stacked = leaf.layer is not None
    assert (leaf.layer or 0) == len(values[leaf.path]) - 1, leaf
    assert stacked or len(values[leaf.path]) == 1, leaf
  is_stacked = {leaf.path: leaf.layer is not None for leaf in leaves(config)}
  variables = dict(nnx.to_flat_state(state))
  assert set(variables) == set(values), set(variables) ^ set(values)
  for path, parts in values.items():
    array = np.stack(parts) if is_stacked[path] else parts[0]
    assert variables[path].shape == array.shape, (path, array.shape)
    variables[path].set_value(jnp.asarray(array, jnp.float32))
  return nnx.merge(graph, nnx.from_flat_state(variables.items()))
