"""Checkpoints that transformers writes, and reads from us."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import weights
from dsv32_jax.weights import folder

pytestmark = pytest.mark.parity

# transformers 5.23.0 spreads scales evenly over a matrix, which is wrong where
# a block is partial and others are whole: no size here has both.
SIZES = {
  "vocab_size": 64,
  "hidden_size": 128,
  "intermediate_size": 256,
  "moe_intermediate_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "n_routed_experts": 4,
  "n_group": 2,
  "topk_group": 1,
  "num_experts_per_tok": 2,
  "q_lora_rank": 24,
  "kv_lora_rank": 16,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 4,
  "v_head_dim": 6,
  "first_k_dense_replace": 1,
  "max_position_embeddings": 64,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 10000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 32,
  "beta_slow": 1,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}
TOKEN_IDS = np.random.default_rng(0).integers(0, 64, (2, 4))


def make(path, is_dense, max_shard_size="5GB"):
  import torch
  import transformers

  torch.manual_seed(0)
  if is_dense:
    config = transformers.DeepseekV3Config(**SIZES, rope_parameters=dict(YARN))
  else:
    config = transformers.DeepseekV32Config(
      **SIZES,
      rope_parameters=dict(YARN),
      index_n_heads=8,
      index_head_dim=16,
      index_topk=8,
    )
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  model.save_pretrained(path, max_shard_size=max_shard_size)
  return logits_of(model)


def logits_of(model):
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(TOKEN_IDS)).logits.float().numpy()


def assert_logits(got, want):
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_reads_deepseek_v32(tmp_path, max_shard_size):
  want = make(tmp_path, is_dense=False, max_shard_size=max_shard_size)
  assert (tmp_path / folder.INDEX).exists() == (max_shard_size != "5GB")
  assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
  model = weights.load_hf(tmp_path)
  assert_logits(model(jnp.asarray(TOKEN_IDS, jnp.int32)).logits, want)


def test_reads_dense_deepseek_v3(tmp_path):
  """No longer than top-k, the sparse model is the dense one it came from."""
  want = make(tmp_path, is_dense=True)
  model = weights.load_hf(tmp_path)
  assert_logits(model(jnp.asarray(TOKEN_IDS, jnp.int32)).logits, want)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_transformers_reads_what_we_write(tmp_path, is_fp8):
  import torch
  import transformers

  make(tmp_path / "theirs", is_dense=False)
  weights.save_hf(
    weights.load_hf(tmp_path / "theirs"),
    tmp_path / "ours",
    fp8=is_fp8,
    max_shard_bytes=100_000,
  )
  again = weights.load_hf(tmp_path / "ours")
  got = again(jnp.asarray(TOKEN_IDS, jnp.int32)).logits
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
  )
  # What was float8 comes dequantised, exactly, to bfloat16.
  assert_logits(got, logits_of(model.float().eval()))
