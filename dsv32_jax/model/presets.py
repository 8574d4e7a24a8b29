"""Named model shapes, from the released 671B model to a laptop's."""

from dsv32_jax.model import config as config_lib


def deepseek_v32_671b() -> config_lib.ModelConfig:
  """DeepSeek-V3.2 as released: 671B parameters, 37B active a token."""
  return config_lib.ModelConfig(
    vocab_size=129280,
    width=7168,
    num_layers=61,
    num_dense_layers=3,
    ffn_width=18432,
    expert_width=2048,
    num_heads=128,
    query_latent_width=1536,
    latent_width=512,
    nope_width=128,
    rope_width=64,
    value_width=128,
    num_experts=256,
    experts_per_token=8,
    num_expert_groups=8,
    expert_groups_kept=4,
    index_heads=64,
    index_width=128,
    index_top_k=2048,
    num_mtp_layers=1,
  )


def small() -> config_lib.ModelConfig:
  """About 100M parameters: a single accelerator, or a patient CPU."""
  return config_lib.ModelConfig(
    vocab_size=16384,
    width=512,
    num_layers=10,
    num_dense_layers=1,
    ffn_width=1536,
    expert_width=320,
    num_heads=8,
    query_latent_width=256,
    latent_width=128,
    nope_width=64,
    rope_width=32,
    value_width=64,
    num_experts=16,
    experts_per_token=4,
    num_expert_groups=4,
    expert_groups_kept=2,
    index_heads=8,
    index_width=64,
    index_top_k=256,
    rope=config_lib.RopeConfig(factor=1.0),
    max_length=65536,
    num_mtp_layers=1,
    initializer_scale=0.02,
  )


def benchmark_65m() -> config_lib.ModelConfig:
  """The 65M model of the CPU comparison with transformers."""
  return config_lib.ModelConfig(
    vocab_size=8192,
    width=512,
    num_layers=8,
    num_dense_layers=1,
    ffn_width=1024,
    expert_width=256,
    num_heads=8,
    query_latent_width=256,
    latent_width=128,
    nope_width=64,
    rope_width=32,
    value_width=64,
    num_experts=16,
    experts_per_token=4,
    num_expert_groups=4,
    expert_groups_kept=2,
    index_heads=8,
    index_width=64,
    index_top_k=256,
    rope=config_lib.RopeConfig(factor=8.0, original_length=4096),
    max_length=32768,
    initializer_scale=0.02,
  )


def tiny() -> config_lib.ModelConfig:
  """The quickstart's model: minutes of training on two CPU cores."""
  return config_lib.ModelConfig(
    vocab_size=4096,
    width=128,
    num_layers=4,
    num_dense_layers=1,
    ffn_width=384,
    expert_width=96,
    num_heads=4,
    query_latent_width=96,
    latent_width=64,
    nope_width=32,
    rope_width=16,
    value_width=32,
    num_experts=8,
    experts_per_token=2,
    num_expert_groups=4,
    expert_groups_kept=2,
    index_heads=8,
    index_width=32,
    index_top_k=64,
    rope=config_lib.RopeConfig(factor=1.0),
    max_length=4096,
    num_mtp_layers=1,
    initializer_scale=0.02,
  )
