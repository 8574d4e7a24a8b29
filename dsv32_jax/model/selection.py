"""Which keys a query attends to: the indexer's choice, and its controls.

A selector is a value passed to the forward. `DENSE` selects every visible key,
`TopK` is DeepSeek Sparse Attention, `Window` and `Random` are the controls
that show what the indexer adds at the same number of keys.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv32_jax.model import indexer as indexer_lib
from pallas_kernels import bitmask
from pallas_kernels import index_select

# B batch, T queries, S keys, I index heads, K index width, W mask words,
# N selected keys


class Selection(NamedTuple):
  """Chosen keys, as a bitmask, as indices, or both.

  Attributes:
    mask_BTW: uint32; key s is bit s % 32 of word s // 32.
    indices_BTN: int32, ascending, padded at the end with -1.
    invalid_BT: True where a NaN among the scores left the choice empty.
  """

  mask_BTW: jax.Array | None
  indices_BTN: jax.Array | None
  invalid_BT: jax.Array | None


class Visibility(NamedTuple):
  """Which keys causality and document boundaries allow.

  Attributes:
    slots_BT: int32 place of each query among the keys; it sees keys at its
      own slot and before. -1 sees nothing.
    query_segments_BT: int32 document of each query, or None.
    key_segments_BS: int32 document of each key, or None.
  """

  slots_BT: jax.Array
  query_segments_BT: jax.Array | None
  key_segments_BS: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Dense:
  """Every visible key: plain causal attention."""

  def __call__(
    self, index, key_BSK, sight, *, layer, want_indices, kernels=None
  ):
    del index, key_BSK, sight, layer, want_indices, kernels
    return None


@dataclasses.dataclass(frozen=True)
class TopK:
  """The k best index scores, exactly, ties to the lowest index (eq. 2).

  Where there are no more than k keys none is scored.
  """

  k: int

  def takes_all(self, num_keys: int) -> bool:
    """Whether that many keys are all selected where they are visible."""
    return self.k >= num_keys

  def __call__(
    self,
    index: indexer_lib.IndexInputs,
    key_BSK,
    sight: Visibility,
    *,
    layer,
    want_indices: bool,
    kernels: str | None = None,
  ) -> Selection:
    del layer
    if self.takes_all(key_BSK.shape[1]):
      return every_visible(sight, key_BSK.shape[1], self.k, want_indices)
    return _select(
      index.query_BTIK,
      key_BSK,
      index.weight_BTI,
      sight,
      top_k=self.k,
      want_indices=want_indices,
      kernels=kernels,
    )


@dataclasses.dataclass(frozen=True)
class Random:
  """k visible keys by chance, drawn anew for each query and layer.

  Keys get fixed random vectors and each query a random direction; the k
  largest projections are a uniformly random subset of the visible keys.
  """

  k: int
  seed: int = 0
  width: int = 32

  def __call__(
    self, index, key_BSK, sight, *, layer, want_indices, kernels=None
  ):
    del index
    root = jax.random.fold_in(jax.random.key(self.seed), layer)
    for_keys, for_queries = jax.random.split(root)
    batch, num_keys = key_BSK.shape[:2]
    shape = (num_keys, self.width)
    keys_SK = jax.random.normal(for_keys, shape)
    directions_SK = jax.random.normal(for_queries, shape)
    query_BTK = directions_SK[jnp.maximum(sight.slots_BT, 0)]
    # relu(qk) - relu(-qk) = qk: two heads undo the indexer's ReLU.
    query_BTIK = jnp.stack([query_BTK, -query_BTK], axis=2)
    weight_BTI = jnp.broadcast_to(
      jnp.array([1.0, -1.0]), (*sight.slots_BT.shape, 2)
    )
    keys_BSK = jnp.broadcast_to(keys_SK, (batch, *shape))
    return _select(
      query_BTIK,
      keys_BSK,
      weight_BTI,
      sight,
      top_k=self.k,
      want_indices=want_indices,
      kernels=kernels,
    )


@dataclasses.dataclass(frozen=True)
class Window:
  """The k most recent visible keys: sliding-window attention."""

  k: int

  def __call__(
    self, index, key_BSK, sight, *, layer, want_indices, kernels=None
  ):
    del index, layer, kernels
    slots_BT = sight.slots_BT
    invalid_BT = jnp.zeros(slots_BT.shape, bool)
    if not want_indices:
      mask_BTW = window_mask(slots_BT, self.k, key_BSK.shape[1])
      return Selection(mask_BTW, None, invalid_BT)
    offsets_N = jnp.arange(self.k, dtype=jnp.int32)
    indices_BTN = slots_BT[..., None] - offsets_N
    visible_BTN = indices_BTN >= 0
    if sight.key_segments_BS is not None:
      batch_B11 = jnp.arange(slots_BT.shape[0])[:, None, None]
      segments_BTN = jnp.asarray(sight.key_segments_BS)[
        batch_B11, jnp.maximum(indices_BTN, 0)
      ]
      visible_BTN &= segments_BTN == sight.query_segments_BT[..., None]
    indices_BTN = _ascending(jnp.where(visible_BTN, indices_BTN, -1))
    return Selection(None, indices_BTN, invalid_BT)


Selector = Dense | TopK | Random | Window

DENSE = Dense()


def every_visible(sight: Visibility, num_keys: int, k: int, want_indices: bool):
  """Selects all that is visible of at most k keys, as scores would."""
  slots_BT = jnp.minimum(sight.slots_BT, num_keys - 1)
  invalid_BT = jnp.zeros(slots_BT.shape, bool)
  if want_indices and sight.key_segments_BS is None:
    index_N = jnp.arange(k, dtype=jnp.int32)
    indices_BTN = jnp.where(index_N <= slots_BT[..., None], index_N, -1)
    return Selection(None, indices_BTN, invalid_BT)
  visible_BTS = jnp.arange(num_keys) <= slots_BT[..., None]
  if sight.key_segments_BS is not None:
    visible_BTS &= (
      sight.query_segments_BT[:, :, None] == sight.key_segments_BS[:, None]
    )
  mask_BTW = bitmask.pack(visible_BTS)
  if want_indices:
    indices_BTN = bitmask.to_indices(mask_BTW, k, num_keys)
    return Selection(None, indices_BTN, invalid_BT)
  return Selection(mask_BTW, None, invalid_BT)


def window_mask(slots_BT, window: int, num_keys: int):
  """Packs keys in (slot - window, slot] without a [T, S] array.

  The mask ignores segments: every kernel applies them again.
  """
  first_BT = jnp.maximum(slots_BT - window + 1, 0)
  start_W = jnp.arange(-(-num_keys // 32), dtype=jnp.int32) * 32

  def bits_below(bound_BT):
    count_BTW = jnp.clip(bound_BT[..., None] - start_W, 0, 32)
    full = jnp.uint32(0xFFFFFFFF)
    shift_BTW = (32 - jnp.maximum(count_BTW, 1)).astype(jnp.uint32)
    return jnp.where(count_BTW > 0, full >> shift_BTW, jnp.uint32(0))

  return bits_below(slots_BT + 1) & ~bits_below(first_BT)


def from_replay(
  replayed, *, num_keys: int, want_indices: int | None, kernels=None
):
  """Turns recorded words (uint32) or indices (int32) into what is wanted.

  Args:
    replayed: [B,T,W] words or [B,T,N] indices.
    num_keys: keys S.
    want_indices: the most keys a row has, where indices are wanted; else None.
    kernels: implementation that lists the keys of words.

  Returns:
    mask_BTW, or ascending indices_BTN where they are wanted.
  """
  is_mask = replayed.dtype == jnp.uint32
  if want_indices is None:
    return replayed if is_mask else bitmask.from_indices(replayed, num_keys)
  if is_mask:
    return index_select.list_selected(
      replayed, want_indices, num_keys, implementation=kernels
    )
  return _ascending(replayed)


def _ascending(indices_BTN):
  """Sorts indices, -1 to the end."""
  last = jnp.iinfo(jnp.int32).max
  sorted_BTN = jnp.sort(jnp.where(indices_BTN < 0, last, indices_BTN), axis=-1)
  return jnp.where(sorted_BTN == last, -1, sorted_BTN)


def _select(
  query_BTIK, key_BSK, weight_BTI, sight, *, top_k, want_indices, kernels
):
  chosen = index_select.index_select(
    query_BTIK,
    key_BSK,
    weight_BTI,
    sight.slots_BT,
    top_k=top_k,
    query_segments_BT=sight.query_segments_BT,
    key_segments_BS=sight.key_segments_BS,
    want_mask=not want_indices,
    want_indices=want_indices,
    implementation=kernels,
  )
  return Selection(chosen.mask_BTW, chosen.indices_BTN, chosen.invalid_BT)
