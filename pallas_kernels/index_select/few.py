"""Selection for one or two queries, as in decoding, by `lax.top_k`.

Work stops at the first quarter of the keys that covers all visible ones.
"""
# B batch, T queries, S keys, P keys of a level, I index heads, K index width,
# N selected keys

import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask

LEVELS = 4


def select(
  query_BTIK,
  key_BSK,
  weight_BTI,
  slots_BT,
  key_scale_BS,
  *,
  top_k,
  want_mask,
  want_indices,
):
  """Returns the fields of `Selected` in order, for one segment."""
  num_keys = key_BSK.shape[1]

  def branch(width):
    scale_BP = None if key_scale_BS is None else key_scale_BS[:, :width]
    score_BTP = _scores(query_BTIK, key_BSK[:, :width], weight_BTI, scale_BP)
    return _best(score_BTP, slots_BT, top_k)

  indices_BTN, *others = _by_level(branch, num_keys, slots_BT)
  mask_BTW = bitmask.from_indices(indices_BTN, num_keys) if want_mask else None
  return mask_BTW, indices_BTN if want_indices else None, *others


def select_scored(score_BTS, slots_BT, *, top_k):
  """Selects by given scores: indices_BTN and invalid_BT."""

  def branch(width):
    score_BTP = score_BTS[..., :width]
    score_BTP = jnp.where(score_BTP == 0.0, 0.0, score_BTP)
    indices_BTN, _, _, invalid_BT = _best(score_BTP, slots_BT, top_k)
    return indices_BTN, invalid_BT

  return _by_level(branch, score_BTS.shape[-1], slots_BT)


def _by_level(branch, num_keys, slots_BT):
  """Calls branch with the least static width that covers the visible keys."""
  widths = sorted({-(-num_keys * i // LEVELS) for i in range(1, LEVELS + 1)})
  level = sum(
    (jnp.max(slots_BT) >= width).astype(jnp.int32) for width in widths[:-1]
  )
  return lax.switch(level, [functools.partial(branch, w) for w in widths])


def _scores(query_BTIK, key_BPK, weight_BTI, scale_BP):
  """Returns float32 scores [B,T,P] with -0.0 as 0.0."""
  batch, queries, heads, width = query_BTIK.shape
  # Few rows against many: the keys go first, as the operand that streams.
  dot_BPTI = jnp.einsum(
    "BPK,BXK->BPX",
    key_BPK.astype(jnp.float32),
    query_BTIK.astype(jnp.float32).reshape(batch, queries * heads, width),
    precision=lax.Precision.HIGHEST,
  ).reshape(batch, -1, queries, heads)
  weight_BTI = weight_BTI.astype(jnp.float32)
  terms = [
    jnp.maximum(dot_BPTI[..., i], 0.0) * weight_BTI[:, None, :, i]
    for i in range(heads)
  ]
  score_BTP = jnp.swapaxes(functools.reduce(operator.add, terms), 1, 2)
  if scale_BP is not None:
    score_BTP = score_BTP * scale_BP[:, None]
  return jnp.where(score_BTP == 0.0, 0.0, score_BTP)


def _best(score_BTP, slots_BT, top_k):
  """Returns indices_BTN, lse_all_BT, lse_selected_BT and invalid_BT."""
  visible_BTP = jnp.arange(score_BTP.shape[-1]) <= slots_BT[..., None]
  invalid_BT = jnp.any(visible_BTP & jnp.isnan(score_BTP), axis=-1)
  # Hidden keys come after all visible ones, so that a tie at -inf, which goes
  # to the lower index, never lets a hidden key in before a visible one.
  masked_BTP = jnp.where(
    visible_BTP & ~invalid_BT[..., None], score_BTP, -jnp.inf
  )
  size = min(top_k, score_BTP.shape[-1])
  value_BTN, indices_BTN = lax.top_k(masked_BTP, size)
  listed_BTN = indices_BTN <= slots_BT[..., None]
  listed_BTN &= ~invalid_BT[..., None]
  last = jnp.iinfo(jnp.int32).max
  indices_BTN = jnp.where(listed_BTN, indices_BTN.astype(jnp.int32), last)
  indices_BTN = jnp.sort(indices_BTN, axis=-1)
  indices_BTN = jnp.where(indices_BTN == last, -1, indices_BTN)
  padding = [(0, 0), (0, 0), (0, top_k - size)]
  return (
    jnp.pad(indices_BTN, padding, constant_values=-1),
    jax.nn.logsumexp(masked_BTP, axis=-1),
    jax.nn.logsumexp(jnp.where(listed_BTN, value_BTN, -jnp.inf), axis=-1),
    invalid_BT,
  )
