"""Attention over the keys that a packed selection and causality leave.

Used for dense attention (no selection), for sparse attention at lengths where
masking is cheaper than gathering, and for both head layouts: one key head for
each query head (MHA, paper section 2.1) or one for all (MQA, the absorbed form
over the latent).
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, W words of 32 keys

import functools

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import implementations
from pallas_kernels import visibility
from pallas_kernels.masked_attention import ref
from pallas_kernels.masked_attention import tpu
from pallas_kernels.masked_attention import tpu_backward
from pallas_kernels.masked_attention import xla

_FORWARD = {
  "ref": ref.forward,
  "xla": xla.forward,
  "gpu": implementations.at_first_call(__name__, "gpu", "forward"),
  "tpu": tpu.forward,
  "tpu_interpret": implementations.interpreted(tpu.forward),
}
_BACKWARD = {
  "ref": ref.backward,
  "xla": xla.backward,
  "gpu": implementations.at_first_call(__name__, "gpu_backward", "backward"),
  "tpu": tpu_backward.backward,
  "tpu_interpret": implementations.interpreted(tpu_backward.backward),
}


def masked_attention(
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  slots_BT,
  *,
  scale: float,
  mask_BTW=None,
  query_segments_BT=None,
  key_segments_BS=None,
  implementation: str | None = None,
):
  """Attends to the allowed keys, and to the selected ones among them.

  Query t sees key s iff s <= slots[b, t], the segments agree where given, and
  bit s of the query's mask is set where given. Scores, softmax and sums are
  float32 whatever the inputs are.

  Differentiable in query, key and value, from `out` alone: `lse` is a constant
  (the indexer's KL reads it), and a cotangent for it is ignored.

  Args:
    query_BTHQ: queries, float.
    key_BSGQ: keys, G = H or G = 1.
    value_BSGV: values, same G.
    slots_BT: int32, the key slot of each query; -1 for a query that is padding.
    scale: factor of the scores, typically Q**-0.5 and YaRN's.
    mask_BTW: uint32 packed selection (see `bitmask`); None selects all.
    query_segments_BT: int32 document ids, with `key_segments_BS` or not at all.
    key_segments_BS: int32 document ids of the keys.
    implementation: "ref", the definition; "xla", plain XLA; "gpu", Hopper
      kernels; "tpu", the compiled TPU kernels; "tpu_interpret", the same
      kernels interpreted on any machine with unwritten memory as NaN (slow, for
      tests); None, which is "xla".

  Returns:
    (out_BTHV in the dtype of value, lse_BTH float32), the output and the
    log-sum-exp of the scaled scores. A query that sees nothing has output 0 and
    lse -inf.

  Raises:
    ValueError: shapes or dtypes that do not fit, an unknown implementation.
  """
  name = implementations.choose(_FORWARD, implementation)
  _check(query_BTHQ, key_BSGQ, value_BSGV, slots_BT, mask_BTW)
  visibility.check(
    slots_BT, key_BSGQ.shape[1], query_segments_BT, key_segments_BS
  )
  visible = (slots_BT, mask_BTW, query_segments_BT, key_segments_BS)
  return _attend(name, float(scale), query_BTHQ, key_BSGQ, value_BSGV, visible)


def _check(query_BTHQ, key_BSGQ, value_BSGV, slots_BT, mask_BTW):
  if query_BTHQ.ndim != 4 or key_BSGQ.ndim != 4 or value_BSGV.ndim != 4:
    raise ValueError(
      f"{query_BTHQ.shape=}, {key_BSGQ.shape=}, {value_BSGV.shape=} must be "
      "[B,T,H,Q], [B,S,G,Q], [B,S,G,V]"
    )
  implementations.refuse_empty(query_BTHQ, key_BSGQ, value_BSGV)
  batch, queries, heads, width = query_BTHQ.shape
  keys, key_heads = key_BSGQ.shape[1:3]
  if key_BSGQ.shape != (batch, keys, key_heads, width):
    raise ValueError(f"{key_BSGQ.shape=} does not fit {query_BTHQ.shape=}")
  if value_BSGV.shape[:3] != key_BSGQ.shape[:3]:
    raise ValueError(f"{value_BSGV.shape=} does not fit {key_BSGQ.shape=}")
  if key_heads not in (1, heads):
    raise ValueError(f"{key_heads=} must be 1 or {heads=}")
  if slots_BT.shape != (batch, queries):
    raise ValueError(f"{slots_BT.shape=} must be {(batch, queries)}")
  for array in (query_BTHQ, key_BSGQ, value_BSGV):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{array.dtype=} must be floating")
  if mask_BTW is None:
    return
  words = (batch, queries, bitmask.num_words(keys))
  if mask_BTW.shape != words or mask_BTW.dtype != jnp.uint32:
    raise ValueError(
      f"{mask_BTW.shape=}, {mask_BTW.dtype=} must be {words}, uint32"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(name, scale, query_BTHQ, key_BSGQ, value_BSGV, visible):
  return _FORWARD[name](query_BTHQ, key_BSGQ, value_BSGV, visible, scale)


def _attend_forward(name, scale, query_BTHQ, key_BSGQ, value_BSGV, visible):
  # As in sparse_mla.
  out_BTHV, lse_BTH = ad_checkpoint.checkpoint_name(
    _FORWARD[name](query_BTHQ, key_BSGQ, value_BSGV, visible, scale),
    "attention",
  )
  saved = (query_BTHQ, key_BSGQ, value_BSGV, visible, out_BTHV, lse_BTH)
  return (out_BTHV, lse_BTH), saved


def _attend_backward(name, scale, saved, cotangents):
  query_BTHQ, key_BSGQ, value_BSGV, visible, out_BTHV, lse_BTH = saved
  gradients = _BACKWARD[name](
    query_BTHQ,
    key_BSGQ,
    value_BSGV,
    visible,
    scale,
    out_BTHV,
    lse_BTH,
    cotangents[0],
  )
  return (*gradients, None)


_attend.defvjp(_attend_forward, _attend_backward)
