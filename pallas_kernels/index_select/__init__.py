"""Scores of the lightning indexer and the exact choice of the k best keys.

score[t, s] = sum_i weight[t, i] * relu(query[t, i] . key[s]) in float32
(DeepSeek-V3.2 eq. 1); every scale factor is already inside the weight. A query
gets exactly min(top_k, allowed keys) keys: the best scores, equal ones by the
lowest index, -0.0 equal to 0.0.
"""
# B batch, T queries, S keys, I index heads, K index width, W words of 32 keys,
# N selected keys

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import implementations
from pallas_kernels import visibility
from pallas_kernels.index_select import few
from pallas_kernels.index_select import ref
from pallas_kernels.index_select import tpu
from pallas_kernels.index_select import tpu_indices
from pallas_kernels.index_select import xla
from pallas_kernels.index_select.ref import index_scores

__all__ = [
  "FEW_QUERIES",
  "Selected",
  "index_scores",
  "index_select",
  "list_selected",
  "select_scored",
]

# Queries of a sequence up to which plain XLA sorts each row, as in decoding.
FEW_QUERIES = xla.FEW_QUERIES


class Selected(NamedTuple):
  """What the indexer chose for each query.

  Attributes:
    mask_BTW: uint32, key s is bit s % 32 of word s // 32; None if not wanted.
    indices_BTN: int32 [B,T,top_k], ascending, padded at the end with -1; None
      if not wanted.
    lse_all_BT: float32 log-sum-exp of the scores of the allowed keys.
    lse_selected_BT: float32 log-sum-exp of the scores of the selected keys.
    invalid_BT: bool, a NaN among the allowed scores. Such a row selects
      nothing, and like a row that sees no key has both sums at -inf.
  """

  mask_BTW: jax.Array | None
  indices_BTN: jax.Array | None
  lse_all_BT: jax.Array
  lse_selected_BT: jax.Array
  invalid_BT: jax.Array


def index_select(
  query_BTIK,
  key_BSK,
  weight_BTI,
  slots_BT,
  *,
  top_k,
  query_segments_BT=None,
  key_segments_BS=None,
  key_scale_BS=None,
  want_mask=True,
  want_indices=False,
  implementation=None,
):
  """Selects the `top_k` best-scored keys of each query among those it may see.

  Args:
    query_BTIK: index queries; float8_e4m3fn values are allowed.
    key_BSK: index keys, one head; float8_e4m3fn values are allowed.
    weight_BTI: the weight of each head with every scale factor inside.
    slots_BT: int32 key slot of each query; -1 for a padding query.
    top_k: how many keys to select at most.
    query_segments_BT: int32 segments; None is one segment.
    key_segments_BS: int32 segments; None is one segment.
    key_scale_BS: float32 factor of each key's scores, for quantised keys.
    want_mask: whether to return the packed mask.
    want_indices: whether to return the indices.
    implementation: "ref", the definition; "xla", plain XLA in chunks of
      queries; "gpu", Hopper kernels; "tpu", one TPU kernel; "tpu_interpret",
      that kernel interpreted on any device, with uninitialised memory poisoned
      and races reported; or None for the default, "xla".

  Returns:
    A `Selected`. No gradient flows through it.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  _check(query_BTIK, key_BSK, weight_BTI, slots_BT, key_scale_BS, top_k)
  num_keys = key_BSK.shape[1]
  visibility.check(slots_BT, num_keys, query_segments_BT, key_segments_BS)
  select = {
    "ref": ref.select,
    "xla": xla.select,
    "gpu": implementations.at_first_call(__name__, "gpu", "select"),
    "tpu": tpu.select,
    "tpu_interpret": implementations.interpreted(tpu.select),
  }
  name = implementations.choose(select, implementation)
  arrays = jax.lax.stop_gradient(
    (
      query_BTIK,
      key_BSK,
      weight_BTI,
      slots_BT.astype(jnp.int32),
      query_segments_BT,
      key_segments_BS,
      key_scale_BS,
    )
  )
  return Selected(
    *select[name](
      *arrays, top_k=top_k, want_mask=want_mask, want_indices=want_indices
    )
  )


def select_scored(score_BTS, slots_BT, *, top_k):
  """Selects the `top_k` best of given scores, as `index_select` does.

  For a few queries, as in decoding: each row is sorted.

  Args:
    score_BTS: float32 scores of every key.
    slots_BT: int32 key slot of each query; -1 for a padding query.
    top_k: how many keys to select at most.

  Returns:
    indices_BTN int32, ascending, padded at the end with -1, and invalid_BT
    where a NaN among the visible scores left the choice empty.

  Raises:
    ValueError: shapes that do not fit.
  """
  if score_BTS.ndim != 3 or slots_BT.shape != score_BTS.shape[:2]:
    raise ValueError(f"{slots_BT.shape=} does not fit {score_BTS.shape=}")
  if top_k < 1:
    raise ValueError(f"{top_k=} must be at least 1")
  slots_BT = jnp.minimum(slots_BT.astype(jnp.int32), score_BTS.shape[2] - 1)
  return few.select_scored(
    jax.lax.stop_gradient(score_BTS), slots_BT, top_k=top_k
  )


def list_selected(mask_BTW, num_selected, num_keys, *, implementation=None):
  """Turns a packed selection into a list of its keys.

  Args:
    mask_BTW: uint32 [B,T,ceil(num_keys/32)].
    num_selected: length of a list; keys beyond it are left out.
    num_keys: keys S.
    implementation: "tpu", a kernel without a gather; "tpu_interpret", that one
      interpreted; "xla" or None; "ref" and "gpu" are the same as "xla".

  Returns:
    int32 [B,T,num_selected], ascending, padded at the end with -1.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  bitmask.check_words(mask_BTW, num_keys)
  name = implementations.choose(
    ("ref", "xla", "gpu", "tpu", "tpu_interpret"), implementation
  )
  to_indices = {
    "tpu": tpu_indices.to_indices,
    "tpu_interpret": implementations.interpreted(tpu_indices.to_indices),
  }
  if name in to_indices:
    return to_indices[name](mask_BTW, num_selected)
  return bitmask.to_indices(mask_BTW, num_selected, num_keys)


def _check(query_BTIK, key_BSK, weight_BTI, slots_BT, key_scale_BS, top_k):
  if query_BTIK.ndim != 4 or key_BSK.ndim != 3:
    raise ValueError(f"{query_BTIK.shape=} {key_BSK.shape=} need 4 and 3 axes")
  implementations.refuse_empty(query_BTIK, key_BSK)
  batch, queries, _, width = query_BTIK.shape
  num_keys = key_BSK.shape[1]
  if key_BSK.shape != (batch, num_keys, width):
    raise ValueError(f"{key_BSK.shape=} does not fit {query_BTIK.shape=}")
  if weight_BTI.shape != query_BTIK.shape[:3]:
    raise ValueError(f"{weight_BTI.shape=} does not fit {query_BTIK.shape=}")
  if slots_BT.shape != (batch, queries):
    raise ValueError(f"{slots_BT.shape=} does not fit {query_BTIK.shape=}")
  if key_scale_BS is not None and key_scale_BS.shape != (batch, num_keys):
    raise ValueError(f"{key_scale_BS.shape=} does not fit {key_BSK.shape=}")
  if top_k < 1:
    raise ValueError(f"{top_k=} must be at least 1")
