"""The key-value cache: what a layer keeps of each token it has seen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv32_jax.model import config as config_lib
from pallas_kernels import fp8

# L layers, B batch, T new tokens, S slots, C latent, R rotary width,
# K index width, P pages, Z slots of a page, M pages of a sequence, N keys


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


class PagedLayerCache(NamedTuple):
  """One layer's cache in pages that sequences take and give back.

  Slot s of a sequence is slot s % Z of page `table_BM[b, s // Z]`.

  Attributes:
    latent_PZC: normed key-value latents of all sequences.
    key_rope_PZR: rotated shared keys.
    index_key_PZK: rotated index keys, in the model's type or as 8-bit values.
    index_scale_PZ: float32 scales of 8-bit index keys, else None.
    table_BM: int32 pages of each sequence.
    count_B: int32 how many of a call's tokens are real; others are not kept.
  """

  latent_PZC: jax.Array
  key_rope_PZR: jax.Array
  index_key_PZK: jax.Array
  index_scale_PZ: jax.Array | None
  table_BM: jax.Array
  count_B: jax.Array

  def append(self, latent_BTC, key_rope_BTR, index_key_BTK, length_B):
    """Writes the real tokens of each sequence behind the length_B it holds."""
    pages, size = self.latent_PZC.shape[:2]
    offset_T = jnp.arange(latent_BTC.shape[1], dtype=jnp.int32)
    slot_BT = length_B[:, None] + offset_T
    page_BT = jnp.take_along_axis(
      self.table_BM, slot_BT // size, axis=1, mode="clip"
    )
    # A page that does not exist: the write is dropped.
    page_BT = jnp.where(offset_T < self.count_B[:, None], page_BT, pages)

    def write(held_PZX, new_BTX):
      new_BTX = new_BTX.astype(held_PZX.dtype)
      return held_PZX.at[page_BT, slot_BT % size].set(new_BTX, mode="drop")

    scale_PZ = self.index_scale_PZ
    if scale_PZ is not None:
      # Exact: these keys were rounded to 8 bits before.
      index_key_BTK, scale_BT1 = fp8.quantize(index_key_BTK)
      scale_PZ = write(scale_PZ, scale_BT1[..., 0])
    return self._replace(
      latent_PZC=write(self.latent_PZC, latent_BTC),
      key_rope_PZR=write(self.key_rope_PZR, key_rope_BTR),
      index_key_PZK=write(self.index_key_PZK, index_key_BTK),
      index_scale_PZ=scale_PZ,
    )

  def index_keys(self, dtype):
    """Reads every slot's index key: index_key_BSK."""
    key_BMZK = self.index_key_PZK[self.table_BM].astype(dtype)
    if self.index_scale_PZ is not None:
      scale_BMZ = self.index_scale_PZ[self.table_BM]
      key_BMZK = key_BMZK * scale_BMZ[..., None].astype(dtype)
    return key_BMZK.reshape(key_BMZK.shape[0], -1, key_BMZK.shape[-1])

  def rows(self, slot_BTN):
    """Turns slots into rows of the flattened pages; -1 stays."""
    size = self.latent_PZC.shape[1]
    batch, queries, count = slot_BTN.shape
    place_BX = jnp.maximum(slot_BTN, 0).reshape(batch, -1)
    page_BX = jnp.take_along_axis(self.table_BM, place_BX // size, axis=1)
    row_BTN = (page_BX * size + place_BX % size).reshape(batch, queries, count)
    return jnp.where(slot_BTN < 0, -1, row_BTN)


def bytes_per_token(
  config: config_lib.ModelConfig,
  *,
  dtype=jnp.float32,
  eight_bit_index: bool = False,
  with_mtp: bool = False,
) -> int:
  """Bytes that a token takes in all layers' caches; as `empty_pages`."""
  size = jnp.dtype(dtype).itemsize
  index = config.index_width * (1 if eight_bit_index else size)
  index += 4 if eight_bit_index else 0
  attention = (config.latent_width + config.rope_width) * size
  layers = config.num_layers + (config.num_mtp_layers if with_mtp else 0)
  return layers * (attention + index)


def empty_pages(
  config: config_lib.ModelConfig,
  num_pages: int,
  page_size: int,
  *,
  dtype=jnp.float32,
  eight_bit_index: bool = False,
  with_mtp: bool = False,
) -> tuple[tuple, tuple, tuple]:
  """Allocates pages: the arrays of each dense, MoE and MTP layer.

  They are the first four of a PagedLayerCache. The MTP module has none unless
  asked for.
  """
  lead = (num_pages, page_size)
  key_type = jnp.float8_e4m3fn if eight_bit_index else dtype

  def one():
    return (
      jnp.zeros((*lead, config.latent_width), dtype),
      jnp.zeros((*lead, config.rope_width), dtype),
      jnp.zeros((*lead, config.index_width), key_type),
      jnp.zeros(lead, jnp.float32) if eight_bit_index else None,
    )

  return (
    tuple(one() for _ in range(config.num_dense_layers)),
    tuple(one() for _ in range(config.num_moe_layers)),
    tuple(one() for _ in range(config.num_mtp_layers if with_mtp else 0)),
  )
