"""Attention in the latent space over each query's list of selected keys.

The absorbed (MQA) form of multi-head latent attention, paper section 2.1: one
key [latent | rope] and one value, the latent, for all heads, gathered by index.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, N selected

import functools

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.sparse_mla import ref
from pallas_kernels.sparse_mla import tpu
from pallas_kernels.sparse_mla import tpu_backward
from pallas_kernels.sparse_mla import xla

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


def sparse_mla(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  *,
  scale: float,
  indices_are_sorted: bool = False,
  implementation: str | None = None,
):
  """Attends to the listed keys; scores, softmax and sums are float32.

  Differentiable in the four float arrays, from `out_latent` alone: `lse` is a
  constant (the indexer's KL reads it), and a cotangent for it is ignored.

  Args:
    query_latent_BTHC: queries in the latent space, float.
    query_rope_BTHR: rotary part of the queries.
    latent_BSC: the latents, keys and values in one.
    key_rope_BSR: rotary part of the keys.
    indices_BTN: int32 selected keys in [0, S); -1 contributes nothing. A key
      that is listed twice counts twice.
    scale: factor of the scores.
    indices_are_sorted: a promise that each list ascends and has its -1 at the
      end, which saves a TPU the sorting of them.
    implementation: "ref", the definition; "xla", plain XLA; "gpu", Hopper
      kernels, bfloat16 only; "tpu", kernels for a TPU core, bfloat16
      only; "tpu_interpret", the same kernels interpreted on any device, slowly,
      with checks for races; or None, which is "xla".

  Returns:
    (out_latent_BTHC in the dtype of latent, lse_BTH float32). A query whose
    list is empty has output 0 and lse -inf.

  Raises:
    ValueError: shapes or dtypes that do not fit, an unknown implementation.
  """
  name = implementations.choose(_FORWARD, implementation)
  arrays = (query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR)
  _check(*arrays, indices_BTN)
  return _attend(name, float(scale), indices_are_sorted, *arrays, indices_BTN)


def _check(
  query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR, indices_BTN
):
  if query_latent_BTHC.ndim != 4 or latent_BSC.ndim != 3:
    raise ValueError(
      f"{query_latent_BTHC.shape=}, {latent_BSC.shape=} must be [B,T,H,C], "
      "[B,S,C]"
    )
  implementations.refuse_empty(
    query_latent_BTHC, latent_BSC, key_rope_BSR, indices_BTN
  )
  batch, queries, heads, latent = query_latent_BTHC.shape
  keys = latent_BSC.shape[1]
  if latent_BSC.shape != (batch, keys, latent):
    raise ValueError(
      f"{latent_BSC.shape=} does not fit {query_latent_BTHC.shape=}"
    )
  rope = key_rope_BSR.shape[-1]
  if query_rope_BTHR.shape != (batch, queries, heads, rope):
    raise ValueError(
      f"{query_rope_BTHR.shape=} must be {(batch, queries, heads, rope)}"
    )
  if key_rope_BSR.shape != (batch, keys, rope):
    raise ValueError(f"{key_rope_BSR.shape=} must be {(batch, keys, rope)}")
  if indices_BTN.ndim != 3 or indices_BTN.shape[:2] != (batch, queries):
    raise ValueError(f"{indices_BTN.shape=} must be {(batch, queries)} and N")
  if not jnp.issubdtype(indices_BTN.dtype, jnp.signedinteger):
    raise ValueError(f"{indices_BTN.dtype=} must be a signed integer")
  for array in (query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{array.dtype=} must be floating")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(name, scale, is_sorted, *arrays):
  return _FORWARD[name](*arrays, scale, **_hints(name, is_sorted))


def _attend_forward(name, scale, is_sorted, *arrays):
  # A layer that is rematerialised may keep both by this name: named where the
  # result is used, the kernel would run again for what its gradient reads.
  out_BTHC, lse_BTH = ad_checkpoint.checkpoint_name(
    _attend(name, scale, is_sorted, *arrays), "attention"
  )
  return (out_BTHC, lse_BTH), (arrays, out_BTHC, lse_BTH)


def _attend_backward(name, scale, is_sorted, saved, cotangents):
  arrays, out_BTHC, lse_BTH = saved
  gradients = _BACKWARD[name](
    *arrays,
    scale,
    out_BTHC,
    lse_BTH,
    cotangents[0],
    **_hints(name, is_sorted),
  )
  return (*gradients, None)


def _hints(name, is_sorted):
  """Keywords of the implementations that care about the order of lists."""
  return {"is_sorted": is_sorted} if name.startswith("tpu") else {}


_attend.defvjp(_attend_forward, _attend_backward)
