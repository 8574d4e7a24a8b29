"""Packed selections: key s of a query is bit s % 32 of word s // 32.

A selection of S keys takes ceil(S / 32) uint32 words a query; bits at or past S
are zero. The other form is a list of key indices, padded with -1.
"""
# B batch, T queries, S keys, W words of 32 keys, N selected keys, J bits (32)

import jax
import jax.numpy as jnp

BITS = 32
# Into how many parts a row of words is cut to find the n-th set bit.
PARTS = 16


def num_words(num_keys):
  """Returns how many uint32 words hold one bit for each of `num_keys` keys."""
  return -(-num_keys // BITS)


def pack(mask_BTS):
  """Packs bool [B,T,S] into uint32 [B,T,ceil(S/32)]."""
  if mask_BTS.dtype != jnp.bool_:
    raise ValueError(f"{mask_BTS.dtype=} must be bool")
  words = num_words(mask_BTS.shape[-1])
  padding = words * BITS - mask_BTS.shape[-1]
  lead = [(0, 0)] * (mask_BTS.ndim - 1)
  padded = jnp.pad(mask_BTS, [*lead, (0, padding)])
  mask_BTWJ = padded.reshape(*mask_BTS.shape[:-1], words, BITS)
  bits_J = jnp.uint32(1) << jnp.arange(BITS, dtype=jnp.uint32)
  picked_BTWJ = jnp.where(mask_BTWJ, bits_J, jnp.uint32(0))
  return jnp.sum(picked_BTWJ, axis=-1, dtype=jnp.uint32)


def unpack(mask_BTW, num_keys):
  """Unpacks uint32 [B,T,W] into bool [B,T,num_keys]; W = ceil(num_keys/32)."""
  check_words(mask_BTW, num_keys)
  bits_J = jnp.arange(BITS, dtype=jnp.uint32)
  mask_BTWJ = (mask_BTW[..., None] >> bits_J) & jnp.uint32(1)
  flat = mask_BTWJ.reshape(*mask_BTW.shape[:-1], -1)
  return flat[..., :num_keys].astype(jnp.bool_)


def from_indices(indices_BTN, num_keys):
  """Packs key indices int32 [B,T,N]; -1 is padding, order does not matter.

  Indices outside [0, num_keys) set no bit, a repeated one sets its bit once.
  """
  if indices_BTN.ndim != 3:
    raise ValueError(f"{indices_BTN.shape=} must be [B,T,N]")
  batch, queries, _ = indices_BTN.shape
  column_BTN = jnp.where(indices_BTN < 0, num_keys, indices_BTN)
  mask_BTS = jnp.zeros((batch, queries, num_keys), jnp.bool_)
  batch_B11 = jnp.arange(batch)[:, None, None]
  query_1T1 = jnp.arange(queries)[None, :, None]
  mask_BTS = mask_BTS.at[batch_B11, query_1T1, column_BTN].set(
    True, mode="drop"
  )
  return pack(mask_BTS)


def to_indices(mask_BTW, num_selected, num_keys):
  """Lists the set bits of uint32 [B,T,W] as int32 [B,T,num_selected].

  Indices ascend and are padded with -1; bits past the first `num_selected` are
  left out. A search in the running count of bits finds the word of the n-th set
  bit, and five halvings of that word find the bit.
  """
  check_words(mask_BTW, num_keys)
  count_BTW = jax.lax.population_count(mask_BTW).astype(jnp.int32)
  before_BTW = jnp.cumsum(count_BTW, axis=-1) - count_BTW
  total_BT1 = before_BTW[..., -1:] + count_BTW[..., -1:]
  rank_BTN = jnp.broadcast_to(
    jnp.arange(num_selected, dtype=jnp.int32),
    (*mask_BTW.shape[:-1], num_selected),
  )
  word_BTN = _last_at_most(before_BTW, rank_BTN)
  bits_BTN = _take(mask_BTW, word_BTN)
  rank_in_word_BTN = rank_BTN - _take(before_BTW, word_BTN)
  index_BTN = word_BTN * BITS + nth_set_bit(bits_BTN, rank_in_word_BTN)
  return jnp.where(rank_BTN < total_BT1, index_BTN, -1)


def _last_at_most(ascending_BTW, value_BTN):
  """Returns the last w with ascending[w] <= value; ascending[0] <= value.

  Comparisons with every 16th part of the row vectorise, gathers do not: so the
  part is found by counting, and only the place in it by binary search.
  """
  words = ascending_BTW.shape[-1]
  stride = -(-words // PARTS)
  starts = range(0, words, stride)
  found_BTN = [ascending_BTW[..., i : i + 1] <= value_BTN for i in starts]
  part_BTN = sum(x.astype(jnp.int32) for x in found_BTN) - 1
  position_BTN = part_BTN * stride
  for bit in reversed(range((stride - 1).bit_length())):
    next_BTN = jnp.minimum(position_BTN + (1 << bit), words - 1)
    next_value_BTN = _take(ascending_BTW, next_BTN)
    position_BTN = jnp.where(
      next_value_BTN <= value_BTN, next_BTN, position_BTN
    )
  return position_BTN


def _take(x_BTW, index_BTN):
  """Gathers along the last axis; indices are in bounds."""
  return jnp.take_along_axis(
    x_BTW, index_BTN, axis=-1, mode="promise_in_bounds"
  )


def nth_set_bit(bits, rank):
  """Returns the position of the set bit with `rank` set bits below it.

  `bits` are of 32-bit integers, signed or not.
  """
  position = jnp.zeros_like(rank)
  for width in (16, 8, 4, 2, 1):
    low = bits & ((1 << width) - 1)
    in_low = jax.lax.population_count(low).astype(jnp.int32)
    above = rank >= in_low
    rank = jnp.where(above, rank - in_low, rank)
    high = jax.lax.shift_right_logical(bits, jnp.full_like(bits, width))
    bits = jnp.where(above, high, low)
    position = jnp.where(above, position + width, position)
  return position


def check_words(mask_BTW, num_keys):
  """Raises ValueError unless uint32 [...,W] holds a bit for each key."""
  if mask_BTW.dtype != jnp.uint32:
    raise ValueError(f"{mask_BTW.dtype=} must be uint32")
  words = num_words(num_keys)
  if mask_BTW.shape[-1] != words:
    raise ValueError(f"{mask_BTW.shape=} must end in {words=} for {num_keys=}")
