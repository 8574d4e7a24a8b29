"""Group Relative Policy Optimization (paper section 3.1).

The two stabilisers that act on log-probabilities are here: the unbiased KL
(equation 7) and the masking of off-policy sequences (equations 8 and 9). The
two that act on the policy's forward, keep routing and keep sampling mask, are
in learner.py and logprobs.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dsv32_jax.rl import kl

# P prompts, G answers a prompt, B sequences (P * G), T tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
  """The objective. The paper publishes none of its numbers.

  Attributes:
    clip_low: the ratio's lower bound is 1 - clip_low.
    clip_high: the ratio's upper bound is 1 + clip_high.
    kl_weight: weight beta of the KL to the reference, where a domain has none
      of its own.
    off_policy_threshold: delta; drops the surrogate of a sequence whose
      advantage is negative and whose mean log(old / new) exceeds it. None:
      never.
    unbiased_kl: weight K3 by the ratio (equation 7); False: plain K3.
  """

  clip_low: float
  clip_high: float
  kl_weight: float
  off_policy_threshold: float | None
  unbiased_kl: bool = True

  def __post_init__(self):
    for name in ("clip_low", "clip_high", "kl_weight"):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(f"grpo.{name}={value} must be finite and at least 0")
    threshold = self.off_policy_threshold
    if threshold is not None and not threshold >= 0:
      raise ValueError(
        f"grpo.off_policy_threshold={threshold} must be at least 0, or None"
      )


def group_advantages(rewards_PG, *, divide_by_std: bool = False):
  """Rewards minus the mean of their group.

  Args:
    rewards_PG: of G answers to each of P prompts.
    divide_by_std: also divide by the group's standard deviation, as R1 did
      and V3.2 does not.

  Returns:
    float32 advantages_PG; exactly 0 where a group's rewards are all equal.

  Raises:
    ValueError: if the rewards are not [P, G].
  """
  rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
  if rewards_PG.ndim != 2:
    raise ValueError(f"rewards.shape={rewards_PG.shape} must be [P, G]")
  centred_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
  equal_P1 = ~informative_groups(rewards_PG)[:, None]
  if divide_by_std:
    std_P1 = jnp.std(rewards_PG, axis=1, keepdims=True)
    centred_PG = centred_PG / jnp.where(equal_P1, 1.0, std_P1)
  # The mean of equal numbers may be off by a rounding, which a division by
  # the standard deviation would blow up.
  return jnp.where(equal_P1, 0.0, centred_PG)


def informative_groups(rewards_PG):
  """Tells the groups whose rewards differ: bool [P].

  The others have no advantage, and dynamic filtering leaves them out.
  """
  return jnp.max(rewards_PG, axis=1) > jnp.min(rewards_PG, axis=1)


def grpo_loss(
  logp_BT,
  old_logp_BT,
  ref_logp_BT,
  advantages_B,
  token_mask_BT,
  config: GrpoConfig,
  *,
  kl_weight_B=None,
  num_sequences=None,
  trajectory_B=None,
):
  """Minus the GRPO objective (equations 5, 7, 8 and 9).

  Averages over each sequence's masked tokens, then over all B sequences; a
  sequence without such tokens counts as zero. Where a trajectory lies in
  several rows, these are one sequence: one mean over all its tokens, and one
  decision whether it is off-policy.

  Args:
    logp_BT: the policy's log-probabilities of the tokens; differentiable.
    old_logp_BT: the sampler's own.
    ref_logp_BT: the reference's.
    advantages_B: one a sequence.
    token_mask_BT: 1 on tokens that the policy wrote, else 0; what the other
      arrays hold there does not matter.
    config: clipping, KL, masking.
    kl_weight_B: a weight a sequence, in place of the config's.
    num_sequences: what the sum over sequences is divided by, where B is but
      a part of a larger batch or rows are parts; default B.
    trajectory_B: int32, equal in the rows that are parts of one trajectory,
      all of which must be there; default: each row is a sequence.

  Returns:
    The loss and metrics, means as above: `surrogate`, `kl`, `ratio`,
    `ratio_deviation` (squared, from 1), `clipped` (share of tokens whose
    clipped ratio counts), `log_old_over_new` and `dropped_sequences`.

  Raises:
    ValueError: if the shapes do not fit.
  """
  _check_shapes(
    advantages_B,
    kl_weight_B,
    trajectory_B,
    logp=logp_BT,
    old_logp=old_logp_BT,
    ref_logp=ref_logp_BT,
    token_mask=token_mask_BT,
  )
  mask_BT = token_mask_BT.astype(jnp.float32)
  # Padding may hold -inf or NaN, whose gradient a product with 0 would keep.
  logp_BT, old_logp_BT, ref_logp_BT = (
    jnp.where(mask_BT > 0, x_BT.astype(jnp.float32), 0.0)
    for x_BT in (logp_BT, old_logp_BT, ref_logp_BT)
  )

  def whole(x_B):
    """Sums over the rows of a row's trajectory."""
    if trajectory_B is None:
      return x_B
    same_BB = trajectory_B[:, None] == trajectory_B[None, :]
    return jnp.sum(jnp.where(same_BB, x_B[None, :], 0.0), axis=1)

  count_B = jnp.maximum(whole(jnp.sum(mask_BT, axis=1)), 1.0)
  sequences = mask_BT.shape[0] if num_sequences is None else num_sequences

  def token_mean(x_BT):
    return jnp.sum(x_BT * mask_BT, axis=1) / count_B

  def mean(x_B):
    return jnp.sum(x_B) / sequences

  ratio_BT = jnp.exp(logp_BT - old_logp_BT)
  advantages_B = jax.lax.stop_gradient(advantages_B.astype(jnp.float32))
  surrogate_BT, clipped_BT = _surrogate(ratio_BT, advantages_B[:, None], config)
  drift_B = jax.lax.stop_gradient(token_mean(old_logp_BT - logp_BT))
  kept_B = jnp.ones_like(drift_B, bool)
  if config.off_policy_threshold is not None:
    off_policy_B = whole(drift_B) > config.off_policy_threshold
    kept_B = ~(off_policy_B & (advantages_B < 0))
  surrogate_B = jnp.where(kept_B, token_mean(surrogate_BT), 0.0)
  if config.unbiased_kl:
    kl_BT = kl.unbiased_kl(logp_BT, old_logp_BT, ref_logp_BT)
  else:
    kl_BT = kl.plain_kl(logp_BT, ref_logp_BT)
  kl_B = token_mean(kl_BT)
  weight_B = config.kl_weight if kl_weight_B is None else kl_weight_B
  loss = mean(weight_B * kl_B - surrogate_B)
  metrics = {
    "surrogate": mean(surrogate_B),
    "kl": mean(kl_B),
    "ratio": mean(token_mean(ratio_BT)),
    "ratio_deviation": mean(token_mean(jnp.square(ratio_BT - 1.0))),
    "clipped": mean(token_mean(clipped_BT)),
    "log_old_over_new": mean(drift_B),
    # A part is its share of its sequence.
    "dropped_sequences": mean(~kept_B * token_mean(jnp.ones_like(mask_BT))),
  }
  return loss, jax.lax.stop_gradient(metrics)


def _surrogate(ratio_BT, advantage_B1, config):
  """The clipped surrogate and where its clipped branch counts."""
  free_BT = ratio_BT * advantage_B1
  bounded_BT = advantage_B1 * jnp.clip(
    ratio_BT, 1.0 - config.clip_low, 1.0 + config.clip_high
  )
  # Not jnp.minimum, which halves the gradient where both are equal.
  clipped_BT = bounded_BT < free_BT
  return jnp.where(clipped_BT, bounded_BT, free_BT), clipped_BT


def _check_shapes(advantages_B, kl_weight_B, trajectory_B, **arrays):
  shapes = {name: x_BT.shape for name, x_BT in arrays.items()}
  if len(set(shapes.values())) != 1 or arrays["logp"].ndim != 2:
    raise ValueError(f"{shapes=} must be one and the same [B, T]")
  batch = arrays["logp"].shape[0]
  if advantages_B.shape != (batch,):
    raise ValueError(f"{advantages_B.shape=} must be [B] with B={batch}")
  if kl_weight_B is not None and kl_weight_B.shape != (batch,):
    raise ValueError(f"{kl_weight_B.shape=} must be [B] with B={batch}")
  if trajectory_B is not None and trajectory_B.shape != (batch,):
    raise ValueError(f"{trajectory_B.shape=} must be [B] with B={batch}")
