"""Estimates of KL(policy, reference) from tokens that another policy drew.

Paper section 3.1, equation 7. Each takes log-probabilities of the drawn
tokens and is differentiated with respect to the policy's.
"""

import jax
import jax.numpy as jnp

# B batch, T tokens

# Beyond this gap exp(gap) - gap - 1 is as exact as its stable form, and
# exp(gap) would soon overflow.
_LARGE_GAP = 20.0


def plain_kl(logp_BT, ref_logp_BT):
  """The K3 estimate: reference / policy - log(reference / policy) - 1.

  Under tokens drawn from the policy its value is unbiased, its gradient is
  not: it is that of KL(reference, policy).
  """
  gap_BT = ref_logp_BT - logp_BT
  return jnp.expm1(gap_BT) - gap_BT


@jax.custom_jvp
def unbiased_kl(logp_BT, old_logp_BT, ref_logp_BT):
  """K3 times policy / old policy, differentiated through that ratio.

  Under tokens drawn from the old policy, the expected value is
  KL(policy, reference) and the expected gradient is its gradient (equation
  7). A token's gradient coefficient is ratio * log(policy / reference), which
  stays bounded where the policy is far below the reference. The other two
  arguments are constants to it.
  """
  ratio_BT = jnp.exp(logp_BT - old_logp_BT)
  gap_BT = ref_logp_BT - logp_BT
  small_BT = jnp.minimum(gap_BT, _LARGE_GAP)
  exact_BT = ratio_BT * (jnp.expm1(small_BT) - small_BT)
  # The same, with the product of a tiny ratio and a huge exponential joined.
  joined_BT = jnp.exp(ref_logp_BT - old_logp_BT) - ratio_BT * (gap_BT + 1.0)
  return jnp.where(gap_BT > _LARGE_GAP, joined_BT, exact_BT)


def _slope(tangent_BT, kl_BT, logp_BT, old_logp_BT, ref_logp_BT):
  # Written out: differentiated term by term, 1 - exp(gap) would lose the
  # small gaps in which training spends its time.
  ratio_BT = jnp.exp(logp_BT - old_logp_BT)
  return tangent_BT * ratio_BT * (logp_BT - ref_logp_BT)


unbiased_kl.defjvps(_slope, None, None)
