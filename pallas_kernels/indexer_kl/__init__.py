"""The loss that teaches the indexer: KL from the main attention to its scores.

kl[t] = sum_s p[t, s] (log p[t, s] - log_softmax(score[t, :])[s]) over a set of
keys: all that the query may see (dense warm-up, DeepSeek-V3.2 eq. 3) or those
that were selected for it (sparse training, eq. 4). p is the main attention
summed over heads and L1-normalised over the set, a constant of the loss:
p ~ sum_h exp(scale q_h . k_s - lse_h). score is the indexer's, of eq. 1.

Nothing of size [T,S] is kept. Gradients reach the index query, key and weight
only. `indexer_kl` and `indexer_kl_gathered` give one value a query and run a
second time for their gradient; `indexer_kl_loss` and `indexer_kl_gathered_loss`
know each query's weight in the sum beforehand and get both in one go.
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# G key heads (H or 1), Q query width, C latent, R rope width, N selected keys,
# W words of 32 keys

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels import visibility
from pallas_kernels.indexer_kl import checks
from pallas_kernels.indexer_kl import gathered
from pallas_kernels.indexer_kl import gathered_tpu
from pallas_kernels.indexer_kl import ref
from pallas_kernels.indexer_kl import tpu
from pallas_kernels.indexer_kl import xla

__all__ = [
  "indexer_kl",
  "indexer_kl_gathered",
  "indexer_kl_gathered_loss",
  "indexer_kl_loss",
]


def indexer_kl(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_BTHQ,
  key_BSGQ,
  lse_BTH,
  slots_BT,
  *,
  scale,
  mask_BTW=None,
  query_segments_BT=None,
  key_segments_BS=None,
  implementation=None,
):
  """Returns the KL of each query, float32 [B,T] in nats.

  Args:
    index_query_BTIK: index queries, as for `index_select`.
    index_key_BSK: index keys.
    index_weight_BTI: index weights, every scale factor inside.
    query_BTHQ: main attention queries.
    key_BSGQ: main attention keys of H heads, or of one that all share.
    lse_BTH: float32 log-sum-exp of each head's scaled scores over the set.
    slots_BT: int32 key slot of each query; -1 for a padding query.
    scale: factor of the main attention's scores.
    mask_BTW: uint32 packed selection; the set is it AND the visible keys.
      None is all visible keys.
    query_segments_BT: int32 segments; None is one segment.
    key_segments_BS: int32 segments; None is one segment.
    implementation: "ref", "xla", "gpu" (Hopper kernels, bfloat16 only, up to
      64 index heads), "tpu", "tpu_interpret" (the TPU kernels in an interpreter
      that looks for races), or None, which is "xla".

  Returns:
    kl_BT; 0 where the set is empty.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  arrays = _masked_arrays(
    index_query_BTIK,
    index_key_BSK,
    index_weight_BTI,
    query_BTHQ,
    key_BSGQ,
    lse_BTH,
    slots_BT,
    mask_BTW,
    query_segments_BT,
    key_segments_BS,
  )
  evaluate = _MASKED[implementations.choose(_MASKED, implementation)]
  return _per_query(evaluate, float(scale), *arrays)


def indexer_kl_loss(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_BTHQ,
  key_BSGQ,
  lse_BTH,
  slots_BT,
  token_weight_BT,
  *,
  scale,
  mask_BTW=None,
  query_segments_BT=None,
  key_segments_BS=None,
  implementation=None,
):
  """Returns (sum_t token_weight[t] kl[t], kl_BT) for a fixed token_weight.

  The gradient is that of the sum and is taken together with the value; none
  flows through kl_BT or token_weight_BT. All else is as in `indexer_kl`.
  """
  arrays = _masked_arrays(
    index_query_BTIK,
    index_key_BSK,
    index_weight_BTI,
    query_BTHQ,
    key_BSGQ,
    lse_BTH,
    slots_BT,
    mask_BTW,
    query_segments_BT,
    key_segments_BS,
  )
  checks.token_weight(token_weight_BT, slots_BT.shape)
  evaluate = _MASKED[implementations.choose(_MASKED, implementation)]
  return _loss(evaluate, scale, arrays, token_weight_BT)


def indexer_kl_gathered(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  lse_BTH,
  indices_BTN,
  *,
  scale,
  indices_are_sorted=False,
  implementation=None,
):
  """Returns the KL of each query over listed keys, float32 [B,T] in nats.

  The main attention is in absorbed form, over the latent.

  Args:
    index_query_BTIK: index queries, as for `index_select`.
    index_key_BSK: index keys.
    index_weight_BTI: index weights, every scale factor inside.
    query_latent_BTHC: main attention queries against the latent.
    query_rope_BTHR: their rotated part.
    latent_BSC: latents.
    key_rope_BSR: rotated keys, one head.
    lse_BTH: float32 log-sum-exp of each head's scaled scores over the set.
    indices_BTN: int32 key indices without repeats; -1 is no key.
    scale: factor of the main attention's scores.
    indices_are_sorted: a promise that each list ascends and has its -1 at the
      end, which saves a TPU the sorting of them.
    implementation: "ref", "xla", "gpu" (Hopper kernels, bfloat16 only, up to
      64 index heads), "tpu", "tpu_interpret" (the TPU kernels in an interpreter
      that looks for races), or None, which is "xla". The TPU's take rope and
      index widths of at most 128, the GPU's the latter.

  Returns:
    kl_BT; 0 where no key is listed.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  arrays = _gathered_arrays(
    index_query_BTIK,
    index_key_BSK,
    index_weight_BTI,
    query_latent_BTHC,
    query_rope_BTHR,
    latent_BSC,
    key_rope_BSR,
    lse_BTH,
    indices_BTN,
  )
  evaluate = _gathered(implementation, indices_are_sorted)
  return _per_query(evaluate, float(scale), *arrays)


def indexer_kl_gathered_loss(
  index_query_BTIK,
  index_key_BSK,
  index_weight_BTI,
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  lse_BTH,
  indices_BTN,
  token_weight_BT,
  *,
  scale,
  indices_are_sorted=False,
  implementation=None,
):
  """Returns (sum_t token_weight[t] kl[t], kl_BT) over listed keys.

  To `indexer_kl_gathered` what `indexer_kl_loss` is to `indexer_kl`.
  """
  arrays = _gathered_arrays(
    index_query_BTIK,
    index_key_BSK,
    index_weight_BTI,
    query_latent_BTHC,
    query_rope_BTHR,
    latent_BSC,
    key_rope_BSR,
    lse_BTH,
    indices_BTN,
  )
  checks.token_weight(token_weight_BT, indices_BTN.shape[:2])
  evaluate = _gathered(implementation, indices_are_sorted)
  return _loss(evaluate, scale, arrays, token_weight_BT)


def _masked_arrays(*arrays):
  """Checks the arrays of the masked form; returns (trained, constants)."""
  checks.masked(*arrays)
  return arrays[:3], jax.lax.stop_gradient(arrays[3:])


def _gathered_arrays(*arrays):
  """Checks the arrays of the gathered form; returns (trained, constants)."""
  checks.gathered(*arrays)
  return arrays[:3], jax.lax.stop_gradient(arrays[3:])


def _evaluate_reference(reference, scale, trained, constants, weight_BT):
  """Gives a reference its gradient by automatic differentiation."""
  kl_BT, pull_back = jax.vjp(
    lambda *x: reference(*x, *constants, scale=scale), *trained
  )
  return kl_BT, None if weight_BT is None else pull_back(weight_BT)


@functools.cache
def _gathered(implementation, is_sorted):
  """Returns the implementation; those of TPUs care about the order of lists."""
  name = implementations.choose(_GATHERED, implementation)
  if not name.startswith("tpu"):
    return _GATHERED[name]
  return functools.partial(_GATHERED[name], is_sorted=is_sorted)


_MASKED = {
  "ref": functools.partial(_evaluate_reference, ref.indexer_kl),
  "xla": xla.evaluate,
  "gpu": implementations.at_first_call(__name__, "masked_gpu", "evaluate"),
  "tpu": tpu.evaluate,
  "tpu_interpret": implementations.interpreted(tpu.evaluate),
}
_GATHERED = {
  "ref": functools.partial(_evaluate_reference, ref.indexer_kl_gathered),
  "xla": gathered.evaluate,
  "gpu": implementations.at_first_call(__name__, "gathered_gpu", "evaluate"),
  "tpu": gathered_tpu.evaluate,
  "tpu_interpret": implementations.interpreted(gathered_tpu.evaluate),
}


def _loss(evaluate, scale, arrays, token_weight_BT):
  weight_BT = jax.lax.stop_gradient(token_weight_BT.astype(jnp.float32))
  loss, kl_BT = _weighted(evaluate, float(scale), *arrays, weight_BT)
  return loss, jax.lax.stop_gradient(kl_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _per_query(evaluate, scale, trained, constants):
  return evaluate(scale, trained, constants, None)[0]


def _per_query_forward(evaluate, scale, trained, constants):
  return _per_query(evaluate, scale, trained, constants), (trained, constants)


def _per_query_backward(evaluate, scale, arrays, cotangent_BT):
  return evaluate(scale, *arrays, cotangent_BT)[1], None


_per_query.defvjp(_per_query_forward, _per_query_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(evaluate, scale, trained, constants, weight_BT):
  kl_BT = evaluate(scale, trained, constants, None)[0]
  return jnp.sum(kl_BT * weight_BT), kl_BT


def _weighted_forward(evaluate, scale, trained, constants, weight_BT):
  kl_BT, gradients = evaluate(scale, trained, constants, weight_BT)
  return (jnp.sum(kl_BT * weight_BT), kl_BT), gradients


def _weighted_backward(_evaluate, _scale, gradients, cotangents):
  scaled = jax.tree.map(
    lambda x: (x.astype(jnp.float32) * cotangents[0]).astype(x.dtype), gradients
  )
  return scaled, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)
