"""Models with random parameters of any config, biases and norms included."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.model import config as config_lib
from dsv32_jax.model import transformer


def random_model(
  config: config_lib.ModelConfig, seed: int = 0
) -> transformer.Transformer:
  """Draws every float32 variable from a normal distribution."""
  rng = np.random.default_rng(seed)
  graph, state = nnx.split(
    nnx.eval_shape(lambda: transformer.Transformer(config, rngs=nnx.Rngs(0)))
  )

  def draw(leaf):
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

  return nnx.merge(graph, jax.tree.map(draw, state))
