"""Multi-token prediction (V3 report section 2.2), depth 1.

At token i the module sees the main model's normed hidden state and the
embedding of token i + 1, and predicts token i + 2. Embedding and head are the
main model's.
"""

from flax import nnx
import jax.numpy as jnp

from dsv32_jax.model import block as block_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import layers

# B batch, T tokens, D model width, X both inputs' width

_PROJECTION_AXES = (None, "embed")


class MultiTokenPrediction(nnx.Module):
  """Joins hidden state and next embedding, and runs one more MoE block."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs, dtype):
    norm = dict(epsilon=config.norm_epsilon, dtype=dtype)
    self.embedding_norm = layers.RMSNorm(config.width, **norm)
    self.hidden_norm = layers.RMSNorm(config.width, **norm)
    self.projection = layers.parameter(
      rngs,
      (2 * config.width, config.width),
      _PROJECTION_AXES,
      scale=config.initializer_scale,
      dtype=dtype,
    )
    self.block = block_lib.Block(config, is_moe=True, rngs=rngs, dtype=dtype)
    self.final_norm = layers.RMSNorm(config.width, **norm)

  def __call__(self, hidden_BTD, next_embedding_BTD, sequence, options, inputs):
    """Predicts two tokens ahead.

    Args:
      hidden_BTD: main model's hidden states after its final norm.
      next_embedding_BTD: embedding of the token that follows each.
      sequence: of the tokens.
      options: attention options.
      inputs: LayerInputs of the block.

    Returns:
      hidden_BTD for the shared head, the block's new cache (or None), and
      LayerResults.
    """
    joined = jnp.concatenate(
      [self.embedding_norm(next_embedding_BTD), self.hidden_norm(hidden_BTD)],
      axis=-1,
    )
    x_BTD = layers.product(
      "BTX,XD->BTD",
      joined,
      self.projection[...].astype(joined.dtype),
      _PROJECTION_AXES,
    )
    x_BTD, cache, results = self.block(x_BTD, sequence, options, inputs)
    return self.final_norm(x_BTD), cache, results
