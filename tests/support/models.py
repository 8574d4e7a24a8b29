"""Small models and tokens for tests."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dsv32_jax.model import config as config_lib
from dsv32_jax.model import fresh


def tiny_config(**changes) -> config_lib.ModelConfig:
  """A model of a few thousand parameters with every part in it."""
  config = config_lib.ModelConfig(
    vocab_size=61,
    width=32,
    num_layers=3,
    num_dense_layers=1,
    ffn_width=48,
    expert_width=24,
    num_heads=4,
    query_latent_width=24,
    latent_width=16,
    nope_width=8,
    rope_width=8,
    value_width=12,
    num_experts=8,
    experts_per_token=3,
    num_expert_groups=4,
    expert_groups_kept=2,
    index_heads=8,
    index_width=16,
    index_top_k=6,
    rope=config_lib.RopeConfig(factor=4.0, original_length=16),
    max_length=256,
    num_mtp_layers=1,
    # Wide enough that attention and routing are far from uniform.
    initializer_scale=0.2,
  )
  return dataclasses.replace(config, **changes)


def tiny_model(seed=0, *, dtype=jnp.float32, **changes):
  """A fresh tiny model whose router biases are not zero."""
  model = fresh.fresh_model(tiny_config(**changes), seed=seed, dtype=dtype)
  if model.moe_layers is not None:
    bias = model.moe_layers.ffn.expert_bias
    noise = np.random.default_rng(seed).normal(size=bias[...].shape)
    bias[...] = jnp.asarray(0.1 * noise, jnp.float32)
  return model


def random_tokens(shape, vocab_size=61, seed=0):
  """int32 tokens."""
  generator = np.random.default_rng(seed)
  return jnp.asarray(generator.integers(0, vocab_size, shape), jnp.int32)
