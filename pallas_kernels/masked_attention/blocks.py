"""Cuts the arrays of attention in blocks of queries and tiles of keys."""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, W words of 32 keys, X any width. Blocked: L blocks
# (batch, heads, queries), R rows (batch, queries), M parts of the key heads
# (batch, heads), J tiles of a part's keys; in a block P heads share each of its
# G key heads, and T and S are a block's queries and a tile's keys.

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bitmask


class Sizes(NamedTuple):
  """Static sizes of the blocked problem."""

  batch: int
  head_parts: int  # blocks that the heads are cut in
  key_parts: int  # parts that the key heads are cut in: 1 or head_parts
  key_heads: int  # of a block
  query_blocks: int
  queries: int  # of a block
  key_tiles: int
  keys: int  # of a tile


class Blocked(NamedTuple):
  """Inputs cut in blocks; row r is a batch element's block of queries."""

  query_LGPTQ: jax.Array
  key_MJGSQ: jax.Array
  value_MJGSV: jax.Array
  slots_RT: jax.Array
  segments_RT: jax.Array | None
  key_segments_BJS: jax.Array | None
  mask_RTW: jax.Array | None
  row_L: jax.Array
  part_L: jax.Array


def choose_sizes(query_shape, key_shape):
  """Returns the `Sizes` for queries [B,T,H,Q] and keys [B,S,G,Q]."""
  batch, queries, heads, _ = query_shape
  keys, key_heads = key_shape[1:3]
  query_blocks = -(-queries // 512)
  block_queries = -(-queries // query_blocks)
  # A short block of queries takes longer tiles of keys: few, big operations.
  longest = max(512, min(2**15, 2**18 // block_queries))
  key_tiles = -(-keys // longest)
  tile_keys = -(-keys // (key_tiles * bitmask.BITS)) * bitmask.BITS
  # Two heads of 512 queries: a tile's scores stay in the second caches.
  most = max(2, min(heads, 1024 // block_queries))
  block_heads = max(n for n in range(1, most + 1) if heads % n == 0)
  head_parts = heads // block_heads
  return Sizes(
    batch=batch,
    head_parts=head_parts,
    key_parts=1 if key_heads == 1 else head_parts,
    key_heads=1 if key_heads == 1 else block_heads,
    query_blocks=query_blocks,
    queries=block_queries,
    key_tiles=key_tiles,
    keys=tile_keys,
  )


def block_inputs(sizes, query_BTHQ, key_BSGQ, value_BSGV, visible, scale):
  """Cuts the inputs in blocks and tiles, with padding that sees nothing."""
  slots_BT, mask_BTW, segments_BT, key_segments_BS = visible
  batch_L, head_part_L, query_block_L = (
    index.ravel()
    for index in np.indices(
      (sizes.batch, sizes.head_parts, sizes.query_blocks), np.int32
    )
  )
  key_part_L = head_part_L % sizes.key_parts
  # Keys that are padding lie past every slot.
  slots_BT = jnp.minimum(slots_BT.astype(jnp.int32), key_BSGQ.shape[1] - 1)
  words = sizes.key_tiles * sizes.keys // bitmask.BITS
  return Blocked(
    query_LGPTQ=block_queries(sizes, query_BTHQ.astype(jnp.float32) * scale),
    key_MJGSQ=_block_keys(sizes, key_BSGQ),
    value_MJGSV=_block_keys(sizes, value_BSGV),
    slots_RT=_rows(sizes, slots_BT[..., None], 1, -1)[..., 0],
    segments_RT=None
    if segments_BT is None
    else _rows(sizes, segments_BT[..., None], 1, 0)[..., 0],
    key_segments_BJS=None
    if key_segments_BS is None
    else _block_keys_of_batch(sizes, key_segments_BS),
    mask_RTW=None if mask_BTW is None else _rows(sizes, mask_BTW, words, 0),
    row_L=jnp.asarray(batch_L * sizes.query_blocks + query_block_L),
    part_L=jnp.asarray(batch_L * sizes.key_parts + key_part_L),
  )


def _rows(sizes, array_BTX, width, padding):
  """Pads and cuts [B,T,X] into [R,T,width], R = batch times query blocks."""
  _, queries, given = array_BTX.shape
  missing = sizes.query_blocks * sizes.queries - queries
  padded = jnp.pad(
    array_BTX,
    ((0, 0), (0, missing), (0, width - given)),
    constant_values=padding,
  )
  return padded.reshape(-1, sizes.queries, width)


def block_queries(sizes, array_BTHX):
  """Cuts [B,T,H,X] into [L,G,P,T,X]."""
  _, queries, heads, width = array_BTHX.shape
  missing = sizes.query_blocks * sizes.queries - queries
  padded = jnp.pad(array_BTHX, ((0, 0), (0, missing), (0, 0), (0, 0)))
  split = padded.reshape(
    sizes.batch,
    sizes.query_blocks,
    sizes.queries,
    sizes.head_parts,
    sizes.key_heads,
    heads // (sizes.head_parts * sizes.key_heads),
    width,
  )
  blocks = split.transpose(0, 3, 1, 4, 5, 2, 6)
  return blocks.reshape(-1, *blocks.shape[3:])


def join_queries(sizes, array_LGPTX, queries):
  """Undoes `block_queries`."""
  _, key_heads, sharing, block_queries, width = array_LGPTX.shape
  blocks = array_LGPTX.reshape(
    sizes.batch,
    sizes.head_parts,
    sizes.query_blocks,
    key_heads,
    sharing,
    block_queries,
    width,
  )
  joined = blocks.transpose(0, 2, 5, 1, 3, 4, 6).reshape(
    sizes.batch, sizes.query_blocks * block_queries, -1, width
  )
  return joined[:, :queries]


def _block_keys(sizes, array_BSGX):
  """Cuts [B,S,G,X] into [M,J,G,S,X]."""
  _, keys, _, width = array_BSGX.shape
  missing = sizes.key_tiles * sizes.keys - keys
  padded = jnp.pad(array_BSGX, ((0, 0), (0, missing), (0, 0), (0, 0)))
  split = padded.reshape(
    sizes.batch,
    sizes.key_tiles,
    sizes.keys,
    sizes.key_parts,
    sizes.key_heads,
    width,
  )
  tiles = split.transpose(0, 3, 1, 4, 2, 5)
  return tiles.reshape(-1, *tiles.shape[2:])


def join_keys(sizes, array_MJGSX, keys):
  """Undoes `_block_keys`."""
  width = array_MJGSX.shape[-1]
  tiles = array_MJGSX.reshape(
    sizes.batch,
    sizes.key_parts,
    sizes.key_tiles,
    sizes.key_heads,
    sizes.keys,
    width,
  )
  joined = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(
    sizes.batch, sizes.key_tiles * sizes.keys, -1, width
  )
  return joined[:, :keys]


def _block_keys_of_batch(sizes, array_BS):
  """Cuts [B,S] into [B,J,S]."""
  missing = sizes.key_tiles * sizes.keys - array_BS.shape[1]
  padded = jnp.pad(array_BS, ((0, 0), (0, missing)))
  return padded.reshape(sizes.batch, sizes.key_tiles, sizes.keys)
