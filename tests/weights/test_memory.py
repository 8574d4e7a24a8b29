"""Host memory while loading and saving stays near the largest tensor."""

import tracemalloc

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax import weights
from dsv32_jax.model import config as config_lib
from dsv32_jax.weights import load
from dsv32_jax.weights import names
from tests.support import random_model

# 30 MB of parameters in float32, of which the largest tensor has 1.6 MB.
CONFIG = config_lib.ModelConfig(
  vocab_size=1600,
  width=256,
  num_layers=5,
  num_dense_layers=1,
  ffn_width=512,
  expert_width=128,
  num_heads=4,
  query_latent_width=64,
  latent_width=64,
  nope_width=32,
  rope_width=16,
  value_width=32,
  num_experts=16,
  experts_per_token=2,
  num_expert_groups=2,
  expert_groups_kept=1,
  index_heads=4,
  index_width=32,
  index_top_k=16,
)


@pytest.mark.parametrize("fp8", [False, True])
def test_peak(tmp_path, monkeypatch, fp8):
  # Python's allocator sees numpy's arrays and not the devices' own, so small
  # parameters must not be put together on the host here.
  monkeypatch.setattr(load.shards.Filler.__init__, "__defaults__", (0,))
  model = random_model.random_model(CONFIG)
  weights.save_hf(model, tmp_path / "warm", fp8=fp8)
  jax.block_until_ready(weights.load_hf(tmp_path / "warm"))
  sizes = [row.shape[0] * row.shape[-1] for row in names.tensors(CONFIG)]
  largest = 4 * max(sizes)
  total = 4 * names.num_parameters(CONFIG)
  assert total > 12 * largest
  tracemalloc.start()
  loaded = weights.load_hf(tmp_path / "warm", dtype=jnp.float32)
  _, load_peak = tracemalloc.get_traced_memory()
  tracemalloc.reset_peak()
  held, _ = tracemalloc.get_traced_memory()
  weights.save_hf(loaded, tmp_path / "again", fp8=fp8)
  _, save_peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # The bytes as stored, in their own type and laid out; and headers.
  assert load_peak < 4 * largest
  assert save_peak - held < 4 * largest
