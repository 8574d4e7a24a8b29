"""The key-value cache: what a layer keeps of each token it has seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv32_jax.model import config as config_lib

# L layers, B batch, T new tokens, S slots, C latent, R rotary width,
# K index width


class LayerCache(NamedTuple):
  """Per token C + R numbers for the attention and K for the indexer.

  A stack of layers has a leading L axis on every array.

  Attributes:
    latent_BSC: normed key-value latents.
    key_rope_BSR: rotated shared keys.
    index_key_BSK: rotated index keys, quantised if the indexer is.
  """

  latent_BSC: jax.Array
  key_rope_BSR: jax.Array
  index_key_BSK: jax.Array


class Cache(NamedTuple):
  """The whole model's cache.

  Attributes:
    dense: LayerCache of the dense layers: stacked, or one a layer in a tuple.
    moe: likewise of the MoE layers.
    length_B: int32 tokens held so far, for each sequence.
    segments_BS: int32 document of each slot, or None.
  """

  dense: LayerCache | tuple | None
  moe: LayerCache | tuple | None
  length_B: jax.Array
  segments_BS: jax.Array | None = None

  @property
  def capacity(self) -> int:
    held = self.dense if self.dense is not None else self.moe
    first = held if isinstance(held, LayerCache) else held[0]
    return first.latent_BSC.shape[-2]


def empty_cache(
  config: config_lib.ModelConfig,
  batch: int,
  capacity: int,
  *,
  dtype=jnp.float32,
  stacked: bool = True,
) -> Cache:
  """Allocates a cache for `batch` sequences of up to `capacity` tokens.

  Args:
    config: the model's shape.
    batch: sequences B.
    capacity: slots S of each.
    dtype: storage type.
    stacked: whether the model's layers are stacked or unstacked.
  """
  widths = (config.latent_width, config.rope_width, config.index_width)

  def layers(count):
    if count == 0:
      return None
    if not stacked:
      return tuple(one(()) for _ in range(count))
    return one((count,))

  def one(lead):
    shape = (*lead, batch, capacity)
    return LayerCache(*(jnp.zeros((*shape, width), dtype) for width in widths))

  return Cache(
    dense=layers(config.num_dense_layers),
    moe=layers(config.num_moe_layers),
    length_B=jnp.zeros((batch,), jnp.int32),
  )


def append(held_BSX, new_BTX, length_B):
  """Writes T tokens of each sequence behind the length_B it holds."""

  def one(held_SX, new_TX, length):
    return jax.lax.dynamic_update_slice(held_SX, new_TX, (length, 0))

  new_BTX = new_BTX.astype(held_BSX.dtype)
  return jax.vmap(one)(held_BSX, new_BTX, length_B)
