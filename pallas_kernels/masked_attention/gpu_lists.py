"""What each query sees, packed for kernels, and which tiles that leaves.

Plain XLA: one bit for each query and key, and lists of key tiles in which some
query of a block sees a key, or of blocks for each key tile.
"""
# B batch, T queries, S keys, W words of 32 keys, M blocks of queries, N key
# tiles

from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import visibility


def visible_words(
  slots_BT, mask_BTW, query_segments_BT, key_segments_BS, num_keys
):
  """Packs which keys each query sees, int32 [B,W,T] with the queries last."""
  allowed_BTS = visibility.allowed(
    slots_BT, num_keys, query_segments_BT, key_segments_BS
  )
  words_BTW = bitmask.pack(allowed_BTS)
  if mask_BTW is not None:
    words_BTW &= mask_BTW
  return lax.bitcast_convert_type(jnp.swapaxes(words_BTW, 1, 2), jnp.int32)


def pad_words(words_BWT, padded_keys, block):
  """Fills up with unseen keys, and with queries to whole blocks."""
  missing = padded_keys // bitmask.BITS - words_BWT.shape[1]
  return jnp.pad(
    words_BWT, [(0, 0), (0, missing), (0, -words_BWT.shape[2] % block)]
  )


def list_tiles(words_BWT, tile, block, *, of_keys=False):
  """Lists the key tiles of which a query in a block sees a key.

  Args:
    words_BWT: what `visible_words` returns, padded to whole tiles and blocks.
    tile: keys of a tile, a multiple of 32.
    block: queries of a block.
    of_keys: list for each tile the blocks that see one of its keys instead.

  Returns:
    (tiles_BMN int32, the listed tiles in ascending order and then others;
    count_BM int32, how many are listed).
  """
  batch, _, queries = words_BWT.shape
  per_tile = tile // bitmask.BITS
  cut = words_BWT.reshape(batch, -1, per_tile, queries // block, block)
  seen_BMN = jnp.any(cut != 0, axis=(2, 4))
  if not of_keys:
    seen_BMN = jnp.swapaxes(seen_BMN, 1, 2)
  tiles_BMN = jnp.argsort(~seen_BMN, axis=-1, stable=True)
  count_BM = jnp.sum(seen_BMN, axis=-1, dtype=jnp.int32)
  return tiles_BMN.astype(jnp.int32), count_BM
