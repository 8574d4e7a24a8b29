"""config.json: both spellings read alike, whatever is unclear refused."""

import json

import pytest

from dsv32_jax.model import config as config_lib
from dsv32_jax.model import presets
from dsv32_jax.weights import hf_config
from tests.support import oracle_checkpoint

RELEASED = oracle_checkpoint.tiny_config()
WHERE = "dir/config.json"
YARN = RELEASED["rope_scaling"]
FP8 = {
  "quant_method": "fp8",
  "fmt": "e4m3",
  "activation_scheme": "dynamic",
  "weight_block_size": [128, 128],
  "scale_fmt": "ue8m0",
}


def transformers_5():
  """The same model as transformers 5.23.0 saves it."""
  fields = RELEASED | {
    "dtype": "bfloat16",
    "head_dim": 8,
    "layer_types": ["indexed_attention"] * 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "mlp_bias": False,
    "output_router_logits": False,
    "pad_token_id": None,
    "qk_head_dim": 20,
    "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0},
    "transformers_version": "5.23.0",
    "use_cache": True,
  }
  gone = (
    *("rope_scaling", "rope_theta", "torch_dtype", "ep_size", "moe_layer_freq"),
    *("scoring_func", "topk_method", "num_nextn_predict_layers"),
  )
  return {key: value for key, value in fields.items() if key not in gone}


def test_reads_every_field():
  found = hf_config.parse(RELEASED, WHERE)
  assert not found.is_dense
  assert not found.is_fp8
  assert found.model == config_lib.ModelConfig(
    vocab_size=61,
    width=40,
    num_layers=3,
    num_dense_layers=1,
    ffn_width=56,
    expert_width=24,
    num_heads=3,
    query_latent_width=28,
    latent_width=20,
    nope_width=12,
    rope_width=8,
    value_width=10,
    num_experts=12,
    num_shared_experts=1,
    experts_per_token=3,
    num_expert_groups=4,
    expert_groups_kept=2,
    normalize_expert_weights=True,
    routed_scale=2.5,
    index_heads=8,
    index_width=16,
    index_top_k=6,
    norm_epsilon=1e-6,
    rope=config_lib.RopeConfig(
      theta=10000.0, factor=8.0, original_length=32, beta_fast=32, beta_slow=1
    ),
    max_length=256,
    num_mtp_layers=0,
    initializer_scale=0.02,
    bos_id=0,
    eos_id=1,
  )


def test_both_spellings_are_the_same_model():
  assert hf_config.parse(transformers_5(), WHERE).model == (
    hf_config.parse(RELEASED, WHERE).model
  )


def test_without_yarn():
  for change in (
    {"rope_scaling": None},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
  ):
    found = hf_config.parse(RELEASED | change, WHERE).model
    assert found.rope == config_lib.RopeConfig(factor=1.0)


def test_dense_v3_may_lack_the_indexer():
  fields = RELEASED | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
  }
  for name in ("index_n_heads", "index_head_dim", "index_topk"):
    del fields[name]
  found = hf_config.parse(fields, WHERE)
  assert found.is_dense
  model = found.model
  assert (model.index_heads, model.index_width, model.index_top_k) == (
    *(64, 128),
    2048,
  )
  assert (
    hf_config.parse(fields | {"index_topk": 7}, WHERE).model.index_top_k == 7
  )


@pytest.mark.parametrize("is_fp8", [False, True])
def test_written_config_reads_back(is_fp8):
  for model in (
    presets.deepseek_v32_671b(),
    hf_config.parse(RELEASED, WHERE).model,
    hf_config.parse(RELEASED | {"rope_scaling": None}, WHERE).model,
  ):
    fields = hf_config.to_fields(model, dtype="bfloat16", is_fp8=is_fp8)
    found = hf_config.parse(json.loads(json.dumps(fields)), WHERE)
    assert found.is_fp8 == is_fp8
    assert found.model.rope.factor == model.rope.factor
    assert hf_config.to_fields(
      found.model, dtype="bfloat16", is_fp8=is_fp8
    ) == fields | {"num_nextn_predict_layers": 0}


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"model_type": ["deepseek_v32"]}, "model_type"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ({"vocab_size": "61"}, "vocab_size='61'"),
    ({"vocab_size": 61.0}, "vocab_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"hidden_size": 10**12}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -8}, "hidden_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"n_routed_experts": 10**9}, "n_routed_experts"),
    ({"q_lora_rank": None}, "q_lora_rank=None"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"indexer_rope_interleave": True}, "indexer_rope_interleave=True"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"attention_bias": True}, "attention_bias"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ({"qk_head_dim": 16}, "qk_head_dim"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ({"layer_types": 3}, "layer_types"),
    ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
    ({"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
    ({"mlp_layer_types": "dense"}, "mlp_layer_types"),
    ({"sliding_window": 4096}, "sliding_window=4096 is an unknown field"),
    ({"eos_token_id": [1, 2]}, "eos_token_id"),
    ({"n_group": 5}, "num_expert_groups"),
    ({"num_experts_per_tok": 9}, "experts_per_token"),
    ({"rope_scaling": 8}, "rope_scaling"),
    ({"rope_scaling": YARN | {"type": "linear"}}, "type='linear'"),
    ({"rope_scaling": YARN | {"type": ["yarn"]}}, "type="),
    ({"rope_scaling": YARN | {"rope_type": "default"}}, "type='yarn'"),
    ({"rope_scaling": YARN | {"factor": "8"}}, "rope_scaling: factor='8'"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
    ({"rope_scaling": YARN | {"mscale": 0.5}}, "mscale"),
    ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor"),
    ({"rope_scaling": YARN | {"short_factor": [1]}}, "short_factor"),
    ({"rope_parameters": YARN}, "rope_scaling=.* are both given"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"quantization_config": FP8 | {"quant_method": "gptq"}}, "quant_method"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt"),
    ({"quantization_config": FP8 | {"scale_fmt": "fp4"}}, "scale_fmt"),
    (
      {"quantization_config": FP8 | {"weight_block_size": [64, 64]}},
      "weight_block_size",
    ),
    ({"quantization_config": "fp8"}, "quantization_config"),
  ],
)
def test_refused(change, field):
  with pytest.raises(ValueError, match=field) as caught:
    hf_config.parse(RELEASED | change, WHERE)
  assert str(caught.value).startswith(WHERE)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name", ["vocab_size", "index_topk", "model_type", "first_k_dense_replace"]
)
def test_missing_field(name):
  fields = {key: value for key, value in RELEASED.items() if key != name}
  with pytest.raises(ValueError, match=f"^{WHERE}.*{name}"):
    hf_config.parse(fields, WHERE)


def test_fp8_is_found():
  fields = RELEASED | {"quantization_config": FP8}
  assert hf_config.parse(fields, WHERE).is_fp8
