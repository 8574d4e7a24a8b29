"""Rows of keys in a TPU core's memory, the indexer's key beside the latent.

As in `sparse_mla.tpu_rows` a key is W rows of 128 words. In bfloat16 the last
row holds the rotary part alone, in its low halves: the index key takes the high
ones, so that it is gathered for nothing. In float32, which takes part in tests
only, a word is a number, and rotary part and index key have rows of their own.
A table ends in a row of zeros, where places without a key point.
"""
# B batch, T queries, S keys, C latent width, R rope width, K index width, N
# keys of a piece, P padded width of a key, X rows of a table (W a key), L lanes

from typing import NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.sparse_mla import tpu_rows as rows


class Layout(NamedTuple):
  """How a key lies in its rows."""

  dtype: jnp.dtype  # bfloat16 or float32
  wide: int  # latent width, padded

  @property
  def words(self):
    """Rows of a key."""
    if self.dtype == jnp.bfloat16:
      return rows.num_words(self.wide)
    return self.wide // rows.LANES + 2


def choose_layout(latent_width, *arrays):
  """Returns the `Layout` in which the arrays lose nothing."""
  dtype = jnp.result_type(jnp.bfloat16, *arrays)
  return Layout(dtype, rows.round_up(latent_width, 2 * rows.LANES))


def pack(layout, latent_BSC, key_rope_BSR, index_key_BSK):
  """Returns the table of keys, int32 [B,X,128]."""

  def widen(array_BSX, width):
    padded = rows.pad_last(array_BSX.astype(layout.dtype), width)
    return jnp.pad(padded, [(0, 0), (0, 1), (0, 0)])

  latent = widen(latent_BSC, layout.wide)
  parts = [widen(x, rows.LANES) for x in (key_rope_BSR, index_key_BSK)]
  if layout.dtype == jnp.bfloat16:
    bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    low, high = jnp.split(bits(latent), 2, axis=-1)
    words = [low | (high << 16), bits(parts[0]) | (bits(parts[1]) << 16)]
  else:
    words = [latent, *parts]
  row = lax.bitcast_convert_type(jnp.concatenate(words, axis=-1), jnp.int32)
  table_BXL = row.reshape(row.shape[0], -1, rows.LANES)
  missing = 8 + -table_BXL.shape[1] % 8
  return jnp.pad(table_BXL, [(0, 0), (rows.FRONT, missing), (0, 0)])


def unpack(layout, raw_ref, start, size):
  """Returns gathered keys [N,P] (latent, rope) and their index keys [N,K]."""
  words = layout.words
  if layout.dtype == jnp.bfloat16:
    halves = [rows.halves(raw_ref, words, start, size, n) for n in range(words)]
    low, high = zip(*halves)
    return jnp.concatenate([*low[:-1], *high[:-1], low[-1]], axis=1), high[-1]
  columns = [
    lax.bitcast_convert_type(
      raw_ref[pl.ds(words * start + n, size, stride=words), :], jnp.float32
    )
    for n in range(words)
  ]
  return jnp.concatenate(columns[:-1], axis=1), columns[-1]


def dot(left, right, dimensions):
  """Contracts into float32; float32 arrays keep all digits."""
  exact = left.dtype == jnp.float32
  return lax.dot_general(
    left,
    right,
    (dimensions, ((), ())),
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def column(line_1X, size, width):
  """Returns the first `size` of a line's numbers as [size, width] columns."""
  lanes = line_1X.shape[1]
  square = jnp.broadcast_to(line_1X, (rows.LANES, lanes)).T[:size]
  if width <= rows.LANES:
    return square[:, :width]
  return jnp.concatenate([square] * (width // rows.LANES), axis=1)


def lines(array_TX, fill=0.0):
  """Returns float32 [T,1,X], the width padded to whole registers."""
  missing = -array_TX.shape[1] % rows.LANES
  padded = jnp.pad(
    array_TX.astype(jnp.float32),
    [(0, 0), (0, missing)],
    constant_values=fill,
  )
  return padded[:, None]


def listed(plan, num_keys, words):
  """Returns bool [I,P]: which places of the items hold a key."""
  size = plan.offsets.shape[-1] // plan.items
  offsets_IP = plan.offsets[: 2 * plan.num_steps].reshape(-1, size)
  return offsets_IP != rows.FRONT + words * num_keys
