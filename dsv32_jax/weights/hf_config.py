"""config.json of Hugging Face checkpoints, to and from a ModelConfig.

Read as DeepSeek released it (`rope_scaling`, `rope_theta`) and as transformers
5 writes it (`rope_parameters`, `mlp_layer_types`), for `deepseek_v32` and the
dense `deepseek_v3`. Every field is either used, required to have the one
value this model implements, or known to say nothing about the computation;
any other field is an error, because it may.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from dsv32_jax.model import config as config_lib

ARCHITECTURES = {
  "deepseek_v32": "DeepseekV32ForCausalLM",
  "deepseek_v3": "DeepseekV3ForCausalLM",
}

# Hugging Face field -> ModelConfig field, largest value believed.
_SIZES = {
  "vocab_size": ("vocab_size", 2**24),
  "hidden_size": ("width", 2**20),
  "num_hidden_layers": ("num_layers", 2**10),
  "intermediate_size": ("ffn_width", 2**24),
  "moe_intermediate_size": ("expert_width", 2**24),
  "num_attention_heads": ("num_heads", 2**16),
  "q_lora_rank": ("query_latent_width", 2**20),
  "kv_lora_rank": ("latent_width", 2**20),
  "qk_nope_head_dim": ("nope_width", 2**16),
  "qk_rope_head_dim": ("rope_width", 2**16),
  "v_head_dim": ("value_width", 2**16),
  "n_routed_experts": ("num_experts", 2**14),
  "num_experts_per_tok": ("experts_per_token", 2**14),
  "n_group": ("num_expert_groups", 2**14),
  "topk_group": ("expert_groups_kept", 2**14),
  "max_position_embeddings": ("max_length", 2**31),
}
_INDEXER_SIZES = {
  "index_n_heads": ("index_heads", 2**16),
  "index_head_dim": ("index_width", 2**16),
  "index_topk": ("index_top_k", 2**31),
}
# What V3.2 uses (config of the release); a dense V3 does not say.
_INDEXER_DEFAULTS = {
  "index_n_heads": 64,
  "index_head_dim": 128,
  "index_topk": 2048,
}
# Sizes that may be 0, with the value of a file that does not say.
_COUNTS = {
  "n_shared_experts": ("num_shared_experts", 2**10, 1),
  "bos_token_id": ("bos_id", 2**24, 0),
  "eos_token_id": ("eos_id", 2**24, 1),
}
_NUMBERS = {
  "rms_norm_eps": ("norm_epsilon", 1e-6),
  "routed_scaling_factor": ("routed_scale", 2.5),
  "initializer_range": ("initializer_scale", 0.006),
}
# Options with the one value that is implemented.
_FIXED = {
  "attention_bias": False,
  "hidden_act": "silu",
  "indexer_rope_interleave": False,
  "mlp_bias": False,
  "moe_layer_freq": 1,
  "rope_interleave": True,
  "scoring_func": "sigmoid",
  "tie_word_embeddings": False,
  "topk_method": "noaux_tc",
}
# Fields that say nothing about the model's function: names, training,
# serving, and values derived from others.
_SILENT_NAMES = """
  _name_or_path architectures attention_dropout auto_map aux_loss_alpha dtype
  ep_size first_k_dense_replace head_dim is_decoder layer_types
  mlp_layer_types model_type norm_topk_prob num_key_value_heads num_mtp_layers
  num_nextn_predict_layers output_router_logits pad_token_id pretraining_tp
  qk_head_dim quantization_config rope_parameters rope_scaling rope_theta
  router_aux_loss_coef seq_aux torch_dtype transformers_version use_cache
"""
_SILENT = frozenset(_SILENT_NAMES.split())
_KNOWN = (
  _SILENT
  | _SIZES.keys()
  | _INDEXER_SIZES.keys()
  | _COUNTS.keys()
  | _NUMBERS.keys()
  | _FIXED.keys()
)
_ROPE_NAMES = """
  attention_factor beta_fast beta_slow factor mscale mscale_all_dim
  original_max_position_embeddings rope_theta rope_type truncate type
"""
_ROPE_KNOWN = frozenset(_ROPE_NAMES.split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfConfig:
  """What config.json says.

  Attributes:
    model: the model, with num_mtp_layers 0: the tensors say whether there is
      an MTP layer, whatever the file claims.
    is_dense: `deepseek_v3`: the checkpoint may lack indexers.
    is_fp8: it declares block-scaled float8 weights.
  """

  model: config_lib.ModelConfig
  is_dense: bool
  is_fp8: bool


class _Fields:
  """A JSON object whose values are taken out with a type and a range."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self.values, self.where = values, where

  def fail(self, name: str, need: str) -> ValueError:
    value = repr(self.values.get(name))
    value = value if len(value) <= 80 else value[:77] + "..."
    return ValueError(f"{self.where}: {name}={value} {need}")

  def size(self, name: str, *, low: int, high: int, default=None) -> int:
    value = self.values.get(name, default)
    if value is None and name not in self.values:
      raise ValueError(f"{self.where}: field {name} is missing")
    if type(value) is not int or not low <= value <= high:
      raise self.fail(name, f"must be an integer from {low} to {high}")
    return value

  def number(self, name: str, *, default=None, low=0.0) -> float:
    value = self.values.get(name, default)
    if value is None and name not in self.values:
      raise ValueError(f"{self.where}: field {name} is missing")
    if type(value) not in (int, float) or not low < value < 1e12:
      raise self.fail(name, f"must be a number above {low}")
    return float(value)

  def fixed(self, name: str, wanted: Any) -> None:
    value = self.values.get(name)
    if value is not None and (
      type(value) is not type(wanted) or value != wanted
    ):
      raise self.fail(name, f"is not supported, only {wanted!r}")


def _rope(fields: _Fields) -> config_lib.RopeConfig:
  """Reads the rotary embedding from either spelling."""
  values = fields.values
  old, new = values.get("rope_scaling"), values.get("rope_parameters")
  if old is not None and new is not None:
    raise fields.fail("rope_scaling", "and rope_parameters are both given")
  for name in ("rope_scaling", "rope_parameters"):
    if not isinstance(values.get(name, {}), dict | None):
      raise fields.fail(name, "must be an object")
  chosen = new if new is not None else old
  name = "rope_parameters" if new is not None else "rope_scaling"
  rope = _Fields(chosen or {}, f"{fields.where}: {name}")
  unknown = sorted(rope.values.keys() - _ROPE_KNOWN)
  if unknown:
    raise rope.fail(unknown[0], "is an unknown field")
  if "rope_theta" in rope.values:
    theta = rope.number("rope_theta", low=1.0)
  else:
    theta = fields.number("rope_theta", default=10000.0, low=1.0)
  kind = rope.values.get("rope_type", rope.values.get("type", "default"))
  for key in rope.values.keys() & {"type", "rope_type"}:
    if rope.values[key] != kind or kind not in ("yarn", "default"):
      raise rope.fail(key, "is not supported, only 'yarn' or 'default'")
  if kind == "default":
    return config_lib.RopeConfig(theta=theta, factor=1.0)
  rope.fixed("truncate", True)
  if rope.values.get("attention_factor") not in (None, 1, 1.0):
    raise rope.fail("attention_factor", "is not supported")
  return config_lib.RopeConfig(
    theta=theta,
    factor=rope.number("factor"),
    original_length=rope.size(
      "original_max_position_embeddings", low=1, high=2**31
    ),
    beta_fast=rope.number("beta_fast", default=32.0),
    beta_slow=rope.number("beta_slow", default=1.0),
    mscale=rope.number("mscale"),
    mscale_all_dim=rope.number("mscale_all_dim"),
  )


def _num_dense_layers(fields: _Fields, num_layers: int) -> int:
  """Reads how many leading layers are dense from either spelling."""
  kinds = fields.values.get("mlp_layer_types")
  if kinds is None:
    dense = fields.size("first_k_dense_replace", low=0, high=2**10)
    return min(dense, num_layers)
  dense = kinds.count("dense") if isinstance(kinds, list) else -1
  if kinds != ["dense"] * dense + ["sparse"] * (num_layers - dense):
    raise fields.fail(
      "mlp_layer_types", "must be dense layers, then sparse ones"
    )
  return dense


def _is_fp8(fields: _Fields) -> bool:
  value = fields.values.get("quantization_config")
  if value is None:
    return False
  if not isinstance(value, dict):
    raise fields.fail("quantization_config", "must be an object")
  inner = _Fields(value, f"{fields.where}: quantization_config")
  if value.get("quant_method") != "fp8":
    raise inner.fail("quant_method", "is not supported, only 'fp8'")
  inner.fixed("fmt", "e4m3")
  inner.fixed("activation_scheme", "dynamic")
  if value.get("weight_block_size") != [128, 128]:
    raise inner.fail("weight_block_size", "is not supported, only [128, 128]")
  if value.get("scale_fmt") not in (None, "ue8m0", "float"):
    raise inner.fail("scale_fmt", "is not supported")
  return True


def _check_options(fields: _Fields, num_heads: int, query_width: int) -> None:
  for name, wanted in _FIXED.items():
    fields.fixed(name, wanted)
  fields.fixed("num_key_value_heads", num_heads)
  fields.fixed("qk_head_dim", query_width)
  kinds = fields.values.get("layer_types") or []
  if not isinstance(kinds, list) or any(
    kind not in ("indexed_attention", "full_attention") for kind in kinds
  ):
    raise fields.fail("layer_types", "is not supported")
  for name in fields.values.keys() - _KNOWN:
    if fields.values[name] not in (None, False, [], {}):
      raise fields.fail(name, "is an unknown field; it may change the model")


def parse(values: Mapping[str, Any], where: str) -> HfConfig:
  """Reads the content of a config.json; `where` is its path, for errors.

  Raises:
    ValueError: naming the file and the field: a missing or unknown field, a
      wrong type, a size out of range, an option that is not implemented.
  """
  fields = _Fields(values, where)
  model_type = values.get("model_type")
  if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
    raise fields.fail("model_type", f"must be one of {list(ARCHITECTURES)}")
  wanted = ARCHITECTURES[model_type]
  if values.get("architectures") not in (None, [wanted]):
    raise fields.fail("architectures", f"is not supported, only {[wanted]}")
  is_dense = model_type == "deepseek_v3"
  found: dict[str, Any] = {}
  for name, (ours, high) in _SIZES.items():
    found[ours] = fields.size(name, low=1, high=high)
  for name, (ours, high) in _INDEXER_SIZES.items():
    default = _INDEXER_DEFAULTS[name] if is_dense else None
    found[ours] = fields.size(name, low=1, high=high, default=default)
  for name, (ours, high, default) in _COUNTS.items():
    found[ours] = fields.size(name, low=0, high=high, default=default)
  for name, (ours, default) in _NUMBERS.items():
    found[ours] = fields.number(name, default=default)
  normalize = values.get("norm_topk_prob", True)
  if type(normalize) is not bool:
    raise fields.fail("norm_topk_prob", "must be true or false")
  _check_options(
    fields, found["num_heads"], found["nope_width"] + found["rope_width"]
  )
  try:
    model = config_lib.ModelConfig(
      **found,
      num_dense_layers=_num_dense_layers(fields, found["num_layers"]),
      normalize_expert_weights=normalize,
      rope=_rope(fields),
      num_mtp_layers=0,
    )
  except ValueError as error:
    if str(error).startswith(where):
      raise
    raise ValueError(f"{where}: {error}") from None
  return HfConfig(model=model, is_dense=is_dense, is_fp8=_is_fp8(fields))


def _rope_fields(rope: config_lib.RopeConfig) -> dict[str, Any]:
  if rope.factor == 1.0:
    return {"rope_theta": rope.theta, "rope_scaling": None}
  return {
    "rope_theta": rope.theta,
    "rope_scaling": {
      "type": "yarn",
      "factor": rope.factor,
      "original_max_position_embeddings": rope.original_length,
      "beta_fast": rope.beta_fast,
      "beta_slow": rope.beta_slow,
      "mscale": rope.mscale,
      "mscale_all_dim": rope.mscale_all_dim,
    },
  }


def to_fields(
  model: config_lib.ModelConfig, *, dtype: str, is_fp8: bool
) -> dict[str, Any]:
  """Returns the content of a `deepseek_v32` config.json as released.

  Args:
    model: the model.
    dtype: name of the type of weights that are not float8.
    is_fp8: whether to declare block-scaled float8 weights.
  """
  assert math.isfinite(model.routed_scale)
  fields: dict[str, Any] = {
    "architectures": [ARCHITECTURES["deepseek_v32"]],
    "model_type": "deepseek_v32",
    "torch_dtype": dtype,
    "first_k_dense_replace": model.num_dense_layers,
    "norm_topk_prob": model.normalize_expert_weights,
    "num_key_value_heads": model.num_heads,
    "num_nextn_predict_layers": model.num_mtp_layers,
  }
  tables = (_SIZES, _INDEXER_SIZES, _COUNTS, _NUMBERS)
  for table in tables:
    fields |= {name: getattr(model, row[0]) for name, row in table.items()}
  fields |= {
    name: value
    for name, value in _FIXED.items()
    if name not in ("indexer_rope_interleave", "mlp_bias", "rope_interleave")
  }
  fields |= _rope_fields(model.rope)
  if is_fp8:
    fields["quantization_config"] = {
      "quant_method": "fp8",
      "fmt": "e4m3",
      "activation_scheme": "dynamic",
      "scale_fmt": "ue8m0",
      "weight_block_size": [128, 128],
    }
  return fields
