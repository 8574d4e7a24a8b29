"""How the TPU kernels of the KL loss cut and order their arrays.

Everything is turned so that keys lie along sublanes and queries along lanes:
a tile is [Z,C], what belongs to a query is a row [1,C] that broadcasts for
free, sums over keys are plain vector additions, and the 32 keys of a mask word
are 32 sublanes under it. Causality, segments and the selection are folded into
one packed mask, and a tile in which no bit is set is neither fetched nor
computed.
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# G key heads (H or 1), Q query width, W words of 32 keys, C queries of a tile,
# Z keys of a tile

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import visibility

QUERIES = 256
KEYS = 512
# Rows of the array that holds one row a query: see `Inputs.rows_B8T`.
ROWS = 8
# Score of a key outside the set, and of a maximum over none.
HIDDEN = -1e30
# What a kernel may use; the least of the generations has 64 MB.
VMEM_BYTES = 60 * 2**20


class Sizes(NamedTuple):
  """Static sizes of the tiled problem."""

  batch: int
  query_tiles: int
  queries: int  # of a tile
  key_tiles: int
  keys: int  # of a tile
  head_groups: int
  heads: int  # of a group
  shared: bool  # one key head for all


class Inputs(NamedTuple):
  """Padded arrays in the order the kernels read them."""

  index_key_BSK: jax.Array
  index_query_BIKT: jax.Array
  weight_BIT: jax.Array
  key_BGSQ: jax.Array
  query_BHQT: jax.Array
  lse_BHT: jax.Array
  words_BWT: jax.Array


class Tables(NamedTuple):
  """For each (batch, query tile, key tile), flat and int32."""

  needed_N: jax.Array  # 1 where a bit is set
  fetch_N: jax.Array  # the key tile to have in memory


def choose_sizes(query_shape, key_shape):
  """Returns the `Sizes` for queries [B,T,H,Q] and keys [B,S,G,Q]."""
  batch, num_queries, heads, _ = query_shape
  num_keys, key_heads = key_shape[1:3]
  queries = min(QUERIES, -(-num_queries // 128) * 128)
  keys = min(KEYS, -(-num_keys // 256) * 256)
  group = 8 if heads % 8 == 0 else heads
  return Sizes(
    batch=batch,
    query_tiles=-(-num_queries // queries),
    queries=queries,
    key_tiles=-(-num_keys // keys),
    keys=keys,
    head_groups=heads // group,
    heads=group,
    shared=key_heads == 1,
  )


def arrange(sizes, trained, constants):
  """Returns (`Inputs`, `Tables`) of the masked form's arrays."""
  index_query_BTIK, index_key_BSK, weight_BTI = trained
  query_BTHQ, key_BSGQ, lse_BTH, slots_BT, mask_BTW, *segments = constants
  num_queries = sizes.query_tiles * sizes.queries
  num_keys = sizes.key_tiles * sizes.keys
  words_BTW = _words(slots_BT, index_key_BSK.shape[1], mask_BTW, *segments)
  words_BTW = _pad(words_BTW, num_queries, 1)
  words_BTW = _pad(words_BTW, num_keys // bitmask.BITS, 2)
  # A head that sees nothing has lse -inf, and exp(score - inf) is 0.
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, jnp.inf, lse_BTH)
  index_query_BTIK, index_key_BSK = _common(index_query_BTIK, index_key_BSK)
  query_BTHQ, key_BSGQ = _common(query_BTHQ, key_BSGQ)
  inputs = Inputs(
    _pad(index_key_BSK, num_keys, 1),
    _pad(index_query_BTIK, num_queries, 1).transpose(0, 2, 3, 1),
    _pad(weight_BTI.astype(jnp.float32), num_queries, 1).transpose(0, 2, 1),
    _pad(key_BSGQ, num_keys, 1).transpose(0, 2, 1, 3),
    _pad(query_BTHQ, num_queries, 1).transpose(0, 2, 3, 1),
    _pad(lse_BTH, num_queries, 1).transpose(0, 2, 1),
    lax.bitcast_convert_type(words_BTW, jnp.int32).transpose(0, 2, 1),
  )
  return inputs, _tables(sizes, words_BTW)


def _common(left, right):
  """Casts both factors to the type they share, at least 16 bits wide."""
  dtype = jnp.promote_types(left.dtype, right.dtype)
  dtype = jnp.promote_types(dtype, jnp.bfloat16)
  return left.astype(dtype), right.astype(dtype)


def _words(slots_BT, num_keys, mask_BTW, segments_BT, key_segments_BS):
  """Packs which keys are in the set of each query, uint32 [B,T,W]."""
  allowed_BTS = visibility.allowed(
    slots_BT, num_keys, segments_BT, key_segments_BS
  )
  words_BTW = bitmask.pack(allowed_BTS)
  return words_BTW if mask_BTW is None else words_BTW & mask_BTW


def _tables(sizes, words_BTW):
  words = sizes.keys // bitmask.BITS
  tiles = words_BTW.reshape(
    *(sizes.batch, sizes.query_tiles, sizes.queries),
    *(sizes.key_tiles, words),
  )
  needed = jnp.any(tiles != 0, axis=(2, 4))
  tile = jnp.where(needed, jnp.arange(sizes.key_tiles, dtype=jnp.int32), 0)
  fetch = lax.cummax(tile, axis=2)
  return Tables(needed.astype(jnp.int32).reshape(-1), fetch.reshape(-1))


def tile_number(sizes, b, q, k):
  """Returns the place of a tile in the `Tables`."""
  return (b * sizes.query_tiles + q) * sizes.key_tiles + k


def visible(words_XC, keys):
  """Unpacks int32 words [Z/32,C] into bool [Z,C]."""
  queries = words_XC.shape[1]
  spread_ZC = jnp.concatenate(
    [
      jnp.broadcast_to(words_XC[x : x + 1], (bitmask.BITS, queries))
      for x in range(keys // bitmask.BITS)
    ]
  )
  key_ZC = lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
  bit_ZC = lax.bitwise_and(key_ZC, jnp.int32(bitmask.BITS - 1))
  return lax.shift_right_logical(spread_ZC, bit_ZC) & 1 != 0


def dot(left, right):
  """Multiplies [Z,X] by [X,C] into float32; float32 inputs keep all digits."""
  exact = left.dtype == jnp.float32
  return jnp.dot(
    left,
    right,
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def grid(sizes):
  """Returns the grid of both kernels."""
  return (sizes.batch, sizes.query_tiles, sizes.key_tiles, sizes.head_groups)


def cost(inputs, index_products):
  """Estimates a kernel that needs every tile; which it does, the data tell.

  Args:
    inputs: its `Inputs`.
    index_products: of each index head and pair: 1 for scores, 3 with gradients.
  """
  batch, heads, width, queries = inputs.query_BHQT.shape
  index_heads, index_width = inputs.index_query_BIKT.shape[1:3]
  pairs = batch * queries * inputs.index_key_BSK.shape[1]
  index = index_products * index_heads * index_width
  return pl.CostEstimate(
    flops=2 * pairs * (heads * width + index),
    transcendentals=pairs * (heads + index_products),
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs),
  )


def input_specs(sizes, inputs):
  """Returns the block specifications of `Inputs`, in order.

  A tile that is not needed names the blocks of the last one that was, so that
  nothing is fetched for it.
  """
  last = sizes.head_groups - 1

  def place(b, q, k, h, needed, fetch):
    tile = tile_number(sizes, b, q, k)
    return fetch[tile], jnp.where(needed[tile] > 0, h, last)

  def key(b, q, k, h, *tables):
    tile, group = place(b, q, k, h, *tables)
    return b, (0 if sizes.shared else group), tile, 0

  index_heads, index_width = inputs.index_query_BIKT.shape[1:3]
  width = inputs.query_BHQT.shape[2]
  queries, keys = sizes.queries, sizes.keys
  key_heads = 1 if sizes.shared else sizes.heads
  return [
    pl.BlockSpec((1, keys, index_width), lambda *a: (a[0], place(*a)[0], 0)),
    pl.BlockSpec(
      (1, index_heads, index_width, queries), lambda b, q, *_: (b, 0, 0, q)
    ),
    pl.BlockSpec((1, index_heads, queries), lambda b, q, *_: (b, 0, q)),
    pl.BlockSpec((1, key_heads, keys, width), key),
    pl.BlockSpec(
      (1, sizes.heads, width, queries),
      lambda *a: (a[0], place(*a)[1], 0, a[1]),
    ),
    pl.BlockSpec(
      (1, sizes.heads, queries), lambda *a: (a[0], place(*a)[1], a[1])
    ),
    pl.BlockSpec(
      (1, keys // bitmask.BITS, queries),
      lambda *a: (a[0], place(*a)[0], a[1]),
    ),
  ]


def fill(sizes, scale, group, inputs, mass_ZC, score_ZC):
  """Adds a group of heads to the tile's mass; the first also sets its scores.

  Keys outside the set are still in both.
  """

  @pl.when(group == 0)
  def _():
    key_ZK = inputs.index_key_BSK[0]
    score_ZC[...] = jnp.zeros_like(score_ZC)

    def add(i, carry):
      dot_ZC = dot(key_ZK, inputs.index_query_BIKT[0, i])
      weight_1C = inputs.weight_BIT[0, pl.ds(i, 1)]
      score_ZC[...] += jnp.maximum(dot_ZC, 0.0) * weight_1C
      return carry

    lax.fori_loop(0, inputs.index_query_BIKT.shape[1], add, 0, unroll=True)

  total_ZC = jnp.zeros(mass_ZC.shape, jnp.float32)
  for j in range(sizes.heads):
    key_ZQ = inputs.key_BGSQ[0, 0 if sizes.shared else j]
    dot_ZC = dot(key_ZQ, inputs.query_BHQT[0, j])
    total_ZC += jnp.exp(dot_ZC * scale - inputs.lse_BHT[0, j : j + 1])

  @pl.when(group == 0)
  def _():
    mass_ZC[...] = total_ZC

  @pl.when(group > 0)
  def _():
    mass_ZC[...] += total_ZC


def in_set(sizes, inputs, mass_ZC, score_ZC):
  """Returns a tile's mass and scores with the keys outside the set hidden."""
  visible_ZC = visible(inputs.words_BWT[0], sizes.keys)
  return (
    jnp.where(visible_ZC, mass_ZC[...], 0.0),
    jnp.where(visible_ZC, score_ZC[...], HIDDEN),
  )


def _pad(array, size, axis):
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, size - array.shape[axis])
  return jnp.pad(array, widths)
