"""Losses of pretraining and of the two stages of continued pretraining.

Each takes plain arrays and a denominator, so that microbatches of one step
add up to the mean over the whole batch, and returns (loss, metrics).
"""

import jax
import jax.numpy as jnp

from dsv32_jax import sharding

# B batch, T tokens, D model width, V vocabulary, L layers

# Float32 logits held at once; longer batches go through in slices of T.
MAX_LOGITS = 2**26


def token_losses(hidden_BTD, kernel_DV, targets_BT):
  """Returns per-token (cross_entropy_BT in nats, correct_BT bool), float32.

  Each device takes its own tokens to the whole head. Logits are recomputed in
  the backward pass instead of kept.
  """
  return sharding.shard_call(
    _token_losses,
    (hidden_BTD, kernel_DV, targets_BT),
    (("batch", "queries", None), head(hidden_BTD), ("batch", "queries")),
    (("batch", "queries"), ("batch", "queries")),
  )


def head(hidden_BTD) -> sharding.Gathered:
  """How `shard_call` takes the output head to hidden states."""
  return sharding.Gathered(("embed", "vocab"), (None, None), hidden_BTD.dtype)


def _token_losses(hidden_BTD, kernel_DV, targets_BT):
  batch, length, _ = hidden_BTD.shape
  per_row = batch * kernel_DV.shape[1]
  slices = 1
  while (
    length % (2 * slices) == 0 and per_row * (length // slices) > MAX_LOGITS
  ):
    slices *= 2

  @jax.checkpoint
  def one(hidden_BTD, targets_BT):
    logits_BTV = jnp.einsum(
      "BTD,DV->BTV",
      hidden_BTD,
      kernel_DV.astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )
    log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    place_BTV = targets_BT[..., None] == jnp.arange(kernel_DV.shape[1])
    target_BT = jnp.sum(jnp.where(place_BTV, logits_BTV, 0), axis=-1)
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return log_total_BT - target_BT, correct_BT

  if slices == 1:
    return one(hidden_BTD, targets_BT)

  def sliced(x):
    return jnp.moveaxis(
      x.reshape(batch, slices, length // slices, *x.shape[2:]), 1, 0
    )

  parts = jax.lax.map(
    lambda args: one(*args), (sliced(hidden_BTD), sliced(targets_BT))
  )
  return jax.tree.map(
    lambda part: jnp.moveaxis(part, 0, 1).reshape(batch, length), parts
  )


def lm_loss(hidden_BTD, kernel_DV, targets_BT, mask_BT, denominator):
  """Next-token cross-entropy, summed over the mask and over denominator.

  Args:
    hidden_BTD: final hidden states.
    kernel_DV: output head.
    targets_BT: int32 next tokens.
    mask_BT: float32 weight of each target.
    denominator: scalar, the step's total mask.

  Returns:
    The loss in nats a token, and `accuracy`, the share of right next tokens.
  """
  loss_BT, correct_BT = token_losses(hidden_BTD, kernel_DV, targets_BT)
  loss = jnp.sum(loss_BT * mask_BT) / denominator
  accuracy = jnp.sum(correct_BT * mask_BT) / denominator
  return loss, {"accuracy": accuracy}


def mtp_targets(targets_BT, mask_BT):
  """Shifts targets by one more token, within the documents.

  Position i of the multi-token prediction predicts token i + 2: the target of
  position i + 1, where both positions have a target.

  Returns:
    targets_BT and mask_BT of the second next tokens.
  """
  further_BT = jnp.concatenate(
    [targets_BT[:, 1:], jnp.zeros_like(targets_BT[:, :1])], axis=1
  )
  next_mask_BT = jnp.concatenate(
    [mask_BT[:, 1:], jnp.zeros_like(mask_BT[:, :1])], axis=1
  )
  return further_BT, next_mask_BT


def indexer_loss(kl_LBT, real_BT, denominator):
  """The indexer's KL (paper equations 3 and 4): sum over layers, mean over
  real tokens.

  The paper prints a sum over tokens and says nothing of layers; each layer's
  indexer sees its own KL only, so the choice scales its gradient and no more.

  Args:
    kl_LBT: per layer and token.
    real_BT: bool, False on padding.
    denominator: scalar, the step's real tokens.
  """
  kl_L = jnp.sum(jnp.where(real_BT, kl_LBT, 0.0), axis=(1, 2)) / denominator
  return jnp.sum(kl_L), {"indexer_kl": jnp.mean(kl_L)}
