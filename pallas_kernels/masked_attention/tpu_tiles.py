"""Tiles of the TPU kernels: sizes, relaid masks and the list of work.

Causality, segments and the selection
are folded into one packed mask, relaid so that a kernel expands it without
moving lanes: within a span of 4096 keys, bit n of word j is key 128n + j, so
the 128 words of a span fill the lanes of a register and each bit of them is the
mask of 128 neighbouring keys. A tile of keys is 128 to 4096 keys and reads some
bits of its span's words. Where only causality hides keys no mask is built: the
kernels compare positions with slots.

A (query tile, key tile) pair is empty, whole or partial. The kernels walk a
list of the pairs that are not empty, one int32 each, and so neither load nor
compute the others.
"""
# B batch, T queries, S keys, H heads (of query, key or value), X any width, W
# words of 32 keys, R query tiles of all batches, C key tiles, U spans of 4096
# keys, J lanes (128), Q queries of a tile, N items of work

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import bitmask

LANES = 128
SPAN = LANES * bitmask.BITS
EMPTY, WHOLE, PARTIAL = 0, 1, 2
# An item: bit 0 first of its row, bit 1 last, 2-3 kind, then column and row.
_COLUMN_BIT, _ROW_BIT = 4, 16
_MOST_COLUMNS, _MOST_ROWS = 1 << (_ROW_BIT - _COLUMN_BIT), 1 << (31 - _ROW_BIT)


class Sizes(NamedTuple):
  """Static sizes: tiles, how many there are, and heads of one step."""

  batch: int
  queries: int  # of a tile
  keys: int  # of a tile
  query_tiles: int  # of one batch element
  key_tiles: int
  heads: int  # of one step

  @property
  def span_tiles(self):
    """Key tiles that share the words of one span."""
    return SPAN // self.keys


class Work(NamedTuple):
  """Pairs to visit, row after row: the first `count` of `items_N`."""

  items_N: jax.Array
  count: jax.Array


def choose_sizes(query_shape, num_keys, queries, keys, heads):
  """Returns `Sizes` with tiles of at most `queries` by `keys`."""
  batch, num_queries, num_heads, _ = query_shape
  # 16 rows are one register of bfloat16.
  tile_queries = min(queries, -(-num_queries // 16) * 16)
  tile_keys = LANES
  while tile_keys < min(keys, num_keys):
    tile_keys *= 2
  return Sizes(
    batch=batch,
    queries=tile_queries,
    keys=tile_keys,
    query_tiles=-(-num_queries // tile_queries),
    key_tiles=-(-num_keys // tile_keys),
    heads=max(n for n in range(1, heads + 1) if num_heads % n == 0),
  )


def cost(sizes, heads, widths, item_bytes=2):
  """Estimates a kernel that visits every tile; which are hidden, data tell.

  Args:
    sizes: the tiles.
    heads: query heads in all.
    widths: of each product of a pair of tiles.
    item_bytes: of an entry of the operands.
  """
  rows = sizes.batch * sizes.query_tiles * sizes.queries
  pairs = heads * rows * sizes.key_tiles * sizes.keys
  steps = heads * rows // sizes.queries
  columns = sizes.key_tiles * sizes.keys
  return pl.CostEstimate(
    flops=2 * pairs * sum(widths),
    transcendentals=pairs,
    bytes_accessed=item_bytes * steps * columns * sum(widths[:2]),
  )


def head_major(array_BTHX, tiles, size):
  """Pads T to `tiles` of `size` and brings heads to the front: [H,B*T,X]."""
  length, heads, width = array_BTHX.shape[1:]
  missing = tiles * size - length
  padded = jnp.pad(array_BTHX, ((0, 0), (0, missing), (0, 0), (0, 0)))
  return padded.transpose(2, 0, 1, 3).reshape(heads, -1, width)


def batch_major(array_HRX, batch, length):
  """Undoes `head_major`: [H,B*T,X] to [B,length,H,X]."""
  heads, _, width = array_HRX.shape
  split = array_HRX.reshape(heads, batch, -1, width)[:, :, :length]
  return split.transpose(1, 2, 0, 3)


def padded_slots(sizes, slots_BT, num_keys):
  """Returns the slots [B,T] of the padded queries; padding sees nothing."""
  missing = sizes.query_tiles * sizes.queries - slots_BT.shape[1]
  clipped_BT = jnp.minimum(slots_BT.astype(jnp.int32), num_keys - 1)
  return jnp.pad(clipped_BT, ((0, 0), (0, missing)), constant_values=-1)


def span_words(sizes, slots_BT, num_keys, visible, interpret):
  """Packs all that hides keys into int32 [B,T,U,J]; None if only causality.

  Args:
    sizes: the tiles.
    slots_BT: padded slots.
    num_keys: keys before padding.
    visible: (slots, mask, query segments, key segments), as the front has them.
    interpret: as `pallas_call` takes it.
  """
  _, mask_BTW, segments_BT, key_segments_BS = visible
  if mask_BTW is None and segments_BT is None:
    return None
  batch, queries = slots_BT.shape
  spans = -(-num_keys // SPAN)
  column_UJ = SPAN * jnp.arange(spans)[:, None] + jnp.arange(LANES)
  room_BTUJ = slots_BT[:, :, None, None] - column_UJ
  # The lowest bits, as many as there are groups of 128 keys up to the slot.
  count_BTUJ = jnp.clip((room_BTUJ + LANES) // LANES, 0, bitmask.BITS)
  words_BTUJ = jnp.where(
    count_BTUJ == bitmask.BITS, -1, (1 << (count_BTUJ % bitmask.BITS)) - 1
  )
  padding = (0, queries - visible[0].shape[1])
  if segments_BT is not None:
    segments_BT = jnp.pad(segments_BT, ((0, 0), padding))
    key_segments_BUNJ = jnp.pad(
      key_segments_BS, ((0, 0), (0, spans * SPAN - num_keys))
    ).reshape(batch, 1, spans, bitmask.BITS, LANES)
    same_BTUJ = 0
    for bit in range(bitmask.BITS):
      equal_BTUJ = (
        segments_BT[:, :, None, None] == key_segments_BUNJ[:, :, :, bit]
      )
      same_BTUJ |= equal_BTUJ.astype(jnp.int32) << bit
    words_BTUJ &= same_BTUJ
  if mask_BTW is not None:
    missing = spans * LANES - mask_BTW.shape[2]
    mask_BTW = jnp.pad(mask_BTW, ((0, 0), padding, (0, missing)))
    relaid = _relay(sizes, mask_BTW.reshape(batch * queries, -1), interpret)
    words_BTUJ &= relaid.reshape(words_BTUJ.shape)
  return words_BTUJ


def _relay(sizes, mask_TW, interpret):
  """Relays uint32 [T,W] masks span by span, as int32."""
  block = pl.BlockSpec((sizes.queries, LANES), lambda t, u: (t, u))
  return pl.pallas_call(
    _relay_span,
    grid=(mask_TW.shape[0] // sizes.queries, mask_TW.shape[1] // LANES),
    in_specs=[block],
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(mask_TW.shape, jnp.int32),
    interpret=interpret,
    name="masked_attention_relay",
  )(lax.bitcast_convert_type(mask_TW, jnp.int32))


def _relay_span(mask_TW, words_TJ):
  """Turns bit i of word 4n + c into bit n of word 32c + i.

  That is four transpositions of 32 x 32 bits, side by side. Each is done in
  five steps, which swap the upper right and lower left quarters of squares of
  32, 16, 8, 4 and 2 bits; at last the words are put in order.
  """
  words = mask_TW[...]
  lane = lax.broadcasted_iota(jnp.int32, words.shape, 1)
  for half in (16, 8, 4, 2, 1):
    stride = 4 * half
    low_bits = sum(1 << i for i in range(bitmask.BITS) if not i & half)
    low = jnp.int32(low_bits - (low_bits >> 31 << 32))
    below = pltpu.roll(words, LANES - stride, 1)
    above = pltpu.roll(words, stride, 1)
    words = jnp.where(
      lane & stride == 0,
      (words & low) | ((below & low) << half),
      (words & ~low) | (lax.shift_right_logical(above, half) & low),
    )
  source = 4 * (lane & 31) + (lane >> 5)
  words_TJ[...] = jnp.take_along_axis(
    words, source, axis=1, mode="promise_in_bounds"
  )


def kinds(sizes, slots_BT, words_BTUJ):
  """Returns int32 [R,C], whether each pair of tiles is empty, whole, partial.

  Args:
    sizes: the tiles.
    slots_BT: padded slots.
    words_BTUJ: what `span_words` gave.
  """
  rows = sizes.batch * sizes.query_tiles
  if words_BTUJ is None:
    slots_RQ = slots_BT.reshape(rows, sizes.queries)
    start_C = jnp.arange(sizes.key_tiles, dtype=jnp.int32) * sizes.keys
    any_RC = jnp.max(slots_RQ, axis=1, keepdims=True) >= start_C
    all_RC = jnp.min(slots_RQ, axis=1, keepdims=True) >= start_C + (
      sizes.keys - 1
    )
  else:
    words_RQUJ = words_BTUJ.reshape(rows, sizes.queries, -1, LANES)
    some_RU = lax.reduce(words_RQUJ, jnp.int32(0), lax.bitwise_or, (1, 3))
    every_RU = lax.reduce(words_RQUJ, jnp.int32(-1), lax.bitwise_and, (1, 3))
    any_RC = _tile_bits(sizes, some_RU) != 0
    all_RC = _tile_bits(sizes, every_RU) == _bits_of_tile(sizes)
  return jnp.where(any_RC, jnp.where(all_RC, WHOLE, PARTIAL), EMPTY)


def _bits_of_tile(sizes):
  bits = (1 << (sizes.keys // LANES)) - 1
  return jnp.int32(bits if bits < 1 << 31 else -1)


def _tile_bits(sizes, word_RU):
  """Cuts a word for each span into the bits of its tiles: [R,C]."""
  bits = sizes.keys // LANES
  shift = jnp.arange(sizes.span_tiles, dtype=jnp.int32) * bits
  parts = lax.shift_right_logical(
    *jnp.broadcast_arrays(word_RU[:, :, None], shift)
  )
  parts &= _bits_of_tile(sizes)
  return parts.reshape(word_RU.shape[0], -1)[:, : sizes.key_tiles]


def list_work(kinds_RC):
  """Lists the pairs that are not empty, and one empty pair for an empty row.

  An empty row has results too, so it is visited once.

  Raises:
    ValueError: more tiles than an item has bits for.
  """
  rows, columns = kinds_RC.shape
  if rows >= _MOST_ROWS or columns >= _MOST_COLUMNS:
    raise ValueError(
      f"{rows=} tiles must be under {_MOST_ROWS}, {columns=} under "
      f"{_MOST_COLUMNS}: cut the queries or keys"
    )
  needed_RC = kinds_RC != EMPTY
  barren_R = ~jnp.any(needed_RC, axis=1)
  needed_RC = needed_RC.at[:, 0].set(needed_RC[:, 0] | barren_R)
  column_C = jnp.arange(columns, dtype=jnp.int32)
  row_R1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
  first_R1 = jnp.argmax(needed_RC, axis=1, keepdims=True)
  last_R1 = columns - 1 - jnp.argmax(needed_RC[:, ::-1], axis=1, keepdims=True)
  item_RC = (
    (column_C == first_R1).astype(jnp.int32)
    | (column_C == last_R1).astype(jnp.int32) << 1
    | kinds_RC.astype(jnp.int32) << 2
    | column_C << _COLUMN_BIT
    | row_R1 << _ROW_BIT
  )
  # Row after row; to compile a sort would take a TPU's compiler seconds.
  rank_RC = jnp.cumsum(needed_RC, axis=1, dtype=jnp.int32)
  end_R1 = jnp.cumsum(rank_RC[:, -1:], axis=0, dtype=jnp.int32)
  place_RC = end_R1 - rank_RC[:, -1:] + rank_RC - 1
  # Those not needed have places of their own outside, and are dropped.
  outside_RC = (rows + row_R1) * columns + column_C
  place_RC = jnp.where(needed_RC, place_RC, outside_RC)
  items_N = jnp.full(rows * columns, 2**31 - 1, jnp.int32)
  items_N = items_N.at[place_RC.ravel()].set(
    item_RC.ravel(), mode="drop", unique_indices=True
  )
  return Work(items_N, end_R1[-1, 0])


def is_first(item):
  """Whether an item is the first of its row."""
  return item & 1 != 0


def is_last(item):
  """Whether an item is the last of its row."""
  return item & 2 != 0


def kind_of(item):
  """Returns an item's kind."""
  return (item >> 2) & 3


def column_of(item):
  """Returns an item's column."""
  return (item >> _COLUMN_BIT) & (_MOST_COLUMNS - 1)


def row_of(item):
  """Returns an item's row."""
  return item >> _ROW_BIT
