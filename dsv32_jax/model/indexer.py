"""The lightning indexer (paper section 2.1, equation 1): what it projects.

score[t, s] = sum_i weight[t, i] * relu(query[t, i] . key[s]): few cheap heads
and one shared key decide which tokens the main attention sees. What is done
with the scores is pallas_kernels.index_select's.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax.model import config as config_lib
from dsv32_jax.model import layers
from dsv32_jax.model import rope
from pallas_kernels import fp8

# B batch, T tokens, D model width, U query latent, I index heads,
# K index width, P rotary pairs


class IndexInputs(NamedTuple):
  """What the index scores are made of.

  Attributes:
    query_BTIK: rotated index queries, [rotary | rest] along K.
    key_BTK: rotated index keys of the same tokens, the one shared head.
    weight_BTI: float32 head weights, every scale factor included.
  """

  query_BTIK: jax.Array
  key_BTK: jax.Array
  weight_BTI: jax.Array


def rotate_first(x_BTXK, cos_BTP, sin_BTP):
  """Rotates the first 2P of the last axis, half-split, and keeps the rest."""
  width = 2 * cos_BTP.shape[-1]
  rotated = rope.rotate_half_split(x_BTXK[..., :width], cos_BTP, sin_BTP)
  return jnp.concatenate([rotated, x_BTXK[..., width:]], axis=-1)


def fake_quantize(x_BTXK):
  """Rounds as the official fp8 indexer does; the result is float32.

  Hadamard transform, then e4m3 values under one power-of-two scale a row of
  128. A power of two moves through products, ReLU and sums without rounding,
  so scores from these values equal scores from the 8-bit values with the
  scales applied afterwards.

  Raises:
    ValueError: if K is not a power of two.
  """
  rotated = fp8.hadamard(x_BTXK.astype(jnp.float32)).astype(x_BTXK.dtype)
  values, scales = fp8.quantize(rotated)
  return fp8.dequantize(values, scales)


_QUERY_AXES = ("query_latent", "index_heads", "index_width")
_KEY_AXES = ("embed", "index_width")
_WEIGHT_AXES = ("embed", "index_heads")


class Indexer(nnx.Module):
  """Projects a layer's input to index queries, keys and head weights."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs, dtype):
    self.config = config
    kwargs = dict(rngs=rngs, scale=config.initializer_scale, dtype=dtype)
    heads, width = config.index_heads, config.index_width
    self.query = layers.parameter(
      shape=(config.query_latent_width, heads, width),
      axes=_QUERY_AXES,
      **kwargs,
    )
    self.key = layers.parameter(
      shape=(config.width, width), axes=_KEY_AXES, **kwargs
    )
    self.key_norm = layers.LayerNorm(width, epsilon=config.norm_epsilon)
    self.weight = layers.parameter(
      shape=(config.width, heads), axes=_WEIGHT_AXES, **kwargs
    )

  def __call__(
    self, x_BTD, query_latent_BTU, cos_BTP, sin_BTP, *, quantized: bool
  ) -> IndexInputs:
    """Projects one layer's tokens.

    Inputs are detached: no loss reaches the model through the indexer (paper
    section 2.1.1).

    Args:
      x_BTD: the layer's normed input.
      query_latent_BTU: the normed query latent, shared with the attention.
      cos_BTP, sin_BTP: rotation tables.
      quantized: emulate the official 8-bit scores.
    """
    dtype = x_BTD.dtype
    x_BTD = jax.lax.stop_gradient(x_BTD)
    query_latent_BTU = jax.lax.stop_gradient(query_latent_BTU)
    query_BTIK = layers.product(
      "BTU,UIK->BTIK",
      query_latent_BTU,
      self.query[...].astype(dtype),
      _QUERY_AXES,
    )
    key_BTK = layers.product(
      "BTD,DK->BTK", x_BTD, self.key[...].astype(dtype), _KEY_AXES, keep=True
    )
    query_BTIK = rotate_first(query_BTIK, cos_BTP, sin_BTP)
    key_BTK = rotate_first(self.key_norm(key_BTK), cos_BTP, sin_BTP)
    if quantized:
      query_BTIK, key_BTK = fake_quantize(query_BTIK), fake_quantize(key_BTK)
    # float32 at full precision: rounded weights change the ranking of keys.
    weight_BTI = layers.product(
      "BTD,DI->BTI",
      x_BTD.astype(jnp.float32),
      self.weight[...].astype(jnp.float32),
      _WEIGHT_AXES,
      precision=jax.lax.Precision.HIGHEST,
      keep=True,
    )
    return IndexInputs(
      query_BTIK, key_BTK, weight_BTI * self.config.index_scale
    )
