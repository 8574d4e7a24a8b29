"""Log-probabilities of given tokens, whole-vocabulary arrays never kept.

Keep sampling mask (paper section 3.1): where the sampler truncated its
distribution, the policy is renormalised over the kept set as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.training import losses

# B batch, T tokens, D model width, V vocabulary, K kept tokens, W words


class KeptSets(NamedTuple):
  """The tokens that the sampler could have drawn; an empty set means all.

  At most one of the two is given; none means that nothing was truncated.

  Attributes:
    ids_BTK: int32 token ids, padded with -1.
    bits_BTW: uint32, token v is bit v % 32 of word v // 32.
  """

  ids_BTK: np.ndarray | jax.Array | None = None
  bits_BTW: np.ndarray | jax.Array | None = None


def token_logprobs(
  hidden_BTD, kernel_DV, targets_BT, *, temperature=1.0, kept=KeptSets()
):
  """Returns float32 logp_BT of the targets, and entropy_BT in nats.

  Each device takes its own tokens to the whole head, a slice of them at a
  time; the backward pass computes their logits again.

  Args:
    hidden_BTD: final hidden states.
    kernel_DV: output head.
    targets_BT: int32; must lie in their kept sets.
    temperature: of the sampler; divides the logits.
    kept: what the sampler kept, at the position that draws the target.
  """
  tokens = ("batch", "queries", None)
  return sharding.shard_call(
    lambda *args: _sliced_logprobs(*args, temperature),
    (hidden_BTD, kernel_DV, targets_BT, kept.ids_BTK, kept.bits_BTW),
    (
      tokens,
      losses.head(hidden_BTD),
      ("batch", "queries"),
      tokens,
      tokens,
    ),
    (("batch", "queries"), ("batch", "queries")),
  )


def _sliced_logprobs(
  hidden_BTD, kernel_DV, targets_BT, ids_BTK, bits_BTW, temperature
):
  batch, length, _ = hidden_BTD.shape
  per_row = batch * kernel_DV.shape[1]
  slices = 1
  while (
    length % (2 * slices) == 0
    and per_row * (length // slices) > losses.MAX_LOGITS
  ):
    slices *= 2

  @jax.checkpoint
  def one(args):
    hidden_BTD, targets_BT, ids_BTK, bits_BTW = args
    logits_BTV = jnp.einsum(
      "BTD,DV->BTV",
      hidden_BTD,
      kernel_DV.astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )
    logits_BTV = logits_BTV / temperature
    # Summed, not gathered: the gradient of a gather is a scatter, for which a
    # TPU's compiler sorts.
    place_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(place_BTV, logits_BTV, 0), axis=-1)
    total_BT, entropy_BT = _log_total(logits_BTV, ids_BTK, bits_BTW)
    return target_BT - total_BT, jax.lax.stop_gradient(entropy_BT)

  def cut(x):
    parts = x.reshape(batch, slices, length // slices, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  args = (hidden_BTD, targets_BT, ids_BTK, bits_BTW)
  if slices == 1:
    return one(args)
  parts = jax.lax.map(one, jax.tree.map(cut, args))
  return jax.tree.map(
    lambda part: jnp.moveaxis(part, 0, 1).reshape(batch, length), parts
  )


def _log_total(logits_BTV, ids_BTK, bits_BTW):
  """Logarithm of the kept tokens' total, and their entropy."""
  if ids_BTK is None and bits_BTW is None:
    return _entropy(logits_BTV, jnp.ones((), bool))
  if bits_BTW is not None:
    place_32 = jnp.arange(32, dtype=jnp.uint32)
    bits_BTW32 = (bits_BTW[..., None] >> place_32) & 1
    kept_BTV = bits_BTW32.reshape(*bits_BTW.shape[:-1], -1) > 0
    kept_BTV = kept_BTV[..., : logits_BTV.shape[-1]]
    all_BT1 = ~jnp.any(kept_BTV, axis=-1, keepdims=True)
    return _entropy(logits_BTV, kept_BTV | all_BT1)
  kept_BTK = ids_BTK >= 0
  all_BT1 = ~jnp.any(kept_BTK, axis=-1, keepdims=True)
  logits_BTK = jnp.take_along_axis(logits_BTV, jnp.maximum(ids_BTK, 0), -1)
  # Where nothing is kept by name the first result is not used; it must only
  # be finite, or its gradient would be NaN.
  few = _entropy(logits_BTK, kept_BTK | all_BT1)
  whole = _entropy(logits_BTV, jnp.ones((), bool))
  return tuple(jnp.where(all_BT1[..., 0], w, f) for w, f in zip(whole, few))


def _entropy(logits_BTX, kept_BTX):
  """Log of the total and entropy of the distribution over what is kept."""
  total_BT = jax.nn.logsumexp(
    jnp.where(kept_BTX, logits_BTX, -jnp.inf), axis=-1
  )
  logp_BTX = jax.lax.stop_gradient(logits_BTX - total_BT[..., None])
  # Masked before the exponential: a token outside may be likelier than all
  # inside, and infinity times 0 is NaN.
  logp_BTX = jnp.where(kept_BTX, logp_BTX, 0.0)
  parts_BTX = jnp.where(kept_BTX, jnp.exp(logp_BTX) * logp_BTX, 0.0)
  return total_BT, -jnp.sum(parts_BTX, axis=-1)
