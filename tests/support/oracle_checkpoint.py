"""Checkpoints for the oracle: random ones, and safetensors files read raw.

The parser is this file's own, so that it shares no mistake with a library.
Axes: O output rows, X input columns.
"""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np

from tests.support import oracle_ops

_DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_SCALE = "_scale_inv"


def tiny_config(**changes):
  """A released config.json, tiny: odd widths, two groups kept, YaRN on."""
  config = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 6,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
      "type": "yarn",
      "factor": 8.0,
      "original_max_position_embeddings": 32,
      "beta_fast": 32,
      "beta_slow": 1,
      "mscale": 1.0,
      "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  }
  unknown = set(changes) - set(config)
  if unknown:
    raise ValueError(f"{unknown=} are not fields of the config")
  return config | changes


def attention_shapes(config):
  """Shapes of the tensors below self_attn, by name."""
  width, heads = config["hidden_size"], config["num_attention_heads"]
  query, latent = config["q_lora_rank"], config["kv_lora_rank"]
  nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
  value, index = config["v_head_dim"], config["index_head_dim"]
  return {
    "q_a_proj.weight": (query, width),
    "q_a_layernorm.weight": (query,),
    "q_b_proj.weight": (heads * (nope + rope), query),
    "kv_a_proj_with_mqa.weight": (latent + rope, width),
    "kv_a_layernorm.weight": (latent,),
    "kv_b_proj.weight": (heads * (nope + value), latent),
    "o_proj.weight": (width, heads * value),
    "indexer.wq_b.weight": (config["index_n_heads"] * index, query),
    "indexer.wk.weight": (index, width),
    "indexer.k_norm.weight": (index,),
    "indexer.k_norm.bias": (index,),
    "indexer.weights_proj.weight": (config["index_n_heads"], width),
  }


def mlp_shapes(prefix, width, hidden):
  """Shapes of one SwiGLU's tensors, by name."""
  return {
    f"{prefix}.gate_proj.weight": (hidden, width),
    f"{prefix}.up_proj.weight": (hidden, width),
    f"{prefix}.down_proj.weight": (width, hidden),
  }


def layer_shapes(config, layer):
  """Shapes of one layer's tensors, by name without the layer's prefix."""
  width, experts = config["hidden_size"], config["n_routed_experts"]
  hidden = config["moe_intermediate_size"]
  shapes = {
    "input_layernorm.weight": (width,),
    "post_attention_layernorm.weight": (width,),
  }
  for name, shape in attention_shapes(config).items():
    shapes["self_attn." + name] = shape
  if layer < config["first_k_dense_replace"]:
    return shapes | mlp_shapes("mlp", width, config["intermediate_size"])
  shapes["mlp.gate.weight"] = (experts, width)
  shapes["mlp.gate.e_score_correction_bias"] = (experts,)
  shared = hidden * config["n_shared_experts"]
  shapes |= mlp_shapes("mlp.shared_experts", width, shared)
  for expert in range(experts):
    shapes |= mlp_shapes(f"mlp.experts.{expert}", width, hidden)
  return shapes


def checkpoint_shapes(config):
  """Shapes of every tensor of a checkpoint, MTP layers included, by name."""
  width, vocabulary = config["hidden_size"], config["vocab_size"]
  layers = config["num_hidden_layers"]
  shapes = {
    "model.embed_tokens.weight": (vocabulary, width),
    "model.norm.weight": (width,),
    "lm_head.weight": (vocabulary, width),
  }
  for layer in range(layers + config["num_nextn_predict_layers"]):
    for name, shape in layer_shapes(config, layer).items():
      shapes[f"model.layers.{layer}.{name}"] = shape
    if layer >= layers:
      extra = {
        "embed_tokens.weight": (vocabulary, width),
        "enorm.weight": (width,),
        "hnorm.weight": (width,),
        "eh_proj.weight": (width, 2 * width),
        "shared_head.norm.weight": (width,),
        "shared_head.head.weight": (vocabulary, width),
      }
      for name, shape in extra.items():
        shapes[f"model.layers.{layer}.{name}"] = shape
  return shapes


def random_checkpoint(config, seed):
  """Random tensors by Hugging Face name, float64, exact in bfloat16.

  Norm scales lie around 1, biases around 0, embeddings have unit variance and
  projections the variance 1 / fan-in, so that activations stay near 1. MTP
  copies of the embedding and of the head are equal to the originals.
  """
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in checkpoint_shapes(config).items():
    noise = rng.standard_normal(shape)
    if name.endswith("bias"):
      value = 0.1 * noise
    elif len(shape) == 1:
      value = 1.0 + 0.2 * noise
    elif name.endswith("embed_tokens.weight"):
      value = noise
    else:
      value = noise / np.sqrt(shape[1])
    tensors[name] = value.astype(ml_dtypes.bfloat16).astype(np.float64)
  layers = config["num_hidden_layers"]
  for layer in range(layers, layers + config["num_nextn_predict_layers"]):
    prefix = f"model.layers.{layer}."
    embedding = tensors["model.embed_tokens.weight"]
    tensors[prefix + "embed_tokens.weight"] = embedding.copy()
    head = tensors["lm_head.weight"]
    tensors[prefix + "shared_head.head.weight"] = head.copy()
  return tensors


def stored_dtype(name):
  """Safetensors dtype of a released bf16 checkpoint's tensor."""
  is_float32 = name.endswith(("e_score_correction_bias", "_scale_inv"))
  return "F32" if is_float32 or ".k_norm." in name else "BF16"


def save_checkpoint(folder, config, tensors, dtype_of=stored_dtype):
  """Writes config.json and model.safetensors; dtype_of maps name to dtype."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config, indent=1))
  header, parts, offset = {}, [], 0
  for name in sorted(tensors):
    code = dtype_of(name)
    data = np.ascontiguousarray(tensors[name].astype(_DTYPES[code])).tobytes()
    header[name] = {
      "dtype": code,
      "shape": list(tensors[name].shape),
      "data_offsets": [offset, offset + len(data)],
    }
    offset += len(data)
    parts.append(data)
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(folder / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.writelines(parts)


def read_safetensors(path):
  """Reads one file into raw arrays by name, in their stored dtypes."""
  data = pathlib.Path(path).read_bytes()
  (header_length,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + header_length])
  body = memoryview(data)[8 + header_length :]
  raw = {}
  for name, entry in header.items():
    if name != "__metadata__":
      begin, end = entry["data_offsets"]
      flat = np.frombuffer(body[begin:end], _DTYPES[entry["dtype"]])
      raw[name] = flat.reshape(entry["shape"])
  return raw


def load_checkpoint(folder):
  """Reads a folder: its config and its tensors, dequantised to float64."""
  folder = pathlib.Path(folder)
  config = json.loads((folder / "config.json").read_text())
  raw = {}
  for path in sorted(folder.glob("*.safetensors")):
    raw |= read_safetensors(path)
  tensors = {}
  for name, value in raw.items():
    if name.endswith(_SCALE):
      continue
    if name + _SCALE in raw:
      tensors[name] = oracle_ops.dequantise_weight(value, raw[name + _SCALE])
    else:
      tensors[name] = value.astype(np.float64)
  return config, tensors
