"""The GRPO objective against float64 numpy: value and gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.rl import grpo
from dsv32_jax.rl import kl
from tests.support import tolerances

# P prompts, G answers a prompt, B sequences, T tokens, V vocabulary

CONFIG = grpo.GrpoConfig(
  clip_low=0.2, clip_high=0.3, kl_weight=0.04, off_policy_threshold=0.1
)


def oracle(logp, old, ref, advantages, mask, config, kl_weights=None):
  """Equations 5 to 9 token by token: the loss and its gradient by logp."""
  batch, length = logp.shape
  loss, gradient = 0.0, np.zeros(logp.shape)
  for b in range(batch):
    tokens = [t for t in range(length) if mask[b, t]]
    if not tokens:
      continue
    advantage, scale = advantages[b], 1 / (len(tokens) * batch)
    drift = np.mean([old[b, t] - logp[b, t] for t in tokens])
    threshold = config.off_policy_threshold
    keep = threshold is None or advantage >= 0 or drift <= threshold
    beta = config.kl_weight if kl_weights is None else kl_weights[b]
    for t in tokens:
      ratio = np.exp(logp[b, t] - old[b, t])
      low, high = 1 - config.clip_low, 1 + config.clip_high
      bounded = min(max(ratio, low), high)
      surrogate = min(ratio * advantage, bounded * advantage)
      moves = not (
        (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
      )
      odds = np.exp(ref[b, t] - logp[b, t])
      value, slope = odds - np.log(odds) - 1, 1 - odds
      if config.unbiased_kl:
        value, slope = ratio * value, -ratio * np.log(odds)
      loss += scale * (beta * value - keep * surrogate)
      gradient[b, t] = scale * (beta * slope - keep * moves * ratio * advantage)
  return loss, gradient


def example(seed=0, batch=6, length=9, spread=0.5):
  generator = np.random.default_rng(seed)
  old = -generator.exponential(1.0, (batch, length))
  logp = old + spread * generator.normal(size=old.shape)
  # Sequences that drifted as a whole, with either sign of the advantage.
  logp[:2] -= 0.4
  ref = old + spread * generator.normal(size=old.shape)
  advantages = np.array([-1.0, 1.0, -0.5, 0.7, 0.0, -0.2])[:batch]
  mask = generator.integers(0, 2, old.shape)
  mask[4] = 0
  return logp, old, ref, advantages, mask


def value_and_gradient(arrays, config, **kwargs):
  logp, *rest = (jnp.asarray(x, jnp.float32) for x in arrays)
  loss = lambda logp: grpo.grpo_loss(logp, *rest, config, **kwargs)
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
  return value, gradient, metrics


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_oracle(seed, threshold, unbiased):
  config = dataclasses.replace(
    CONFIG, off_policy_threshold=threshold, unbiased_kl=unbiased
  )
  arrays = example(seed)
  value, gradient, _ = value_and_gradient(arrays, config)
  want, want_gradient = oracle(*arrays, config)
  tolerances.assert_close(value, want)
  tolerances.assert_close(gradient, want_gradient)


def test_each_switch_changes_the_example():
  arrays = example()
  base = oracle(*arrays, CONFIG)[0]
  for change in (
    dict(off_policy_threshold=None),
    dict(unbiased_kl=False),
    dict(clip_low=0.4),
    dict(clip_high=0.6),
    dict(kl_weight=0.0),
  ):
    config = dataclasses.replace(CONFIG, **change)
    other = float(value_and_gradient(arrays, config)[0])
    assert abs(other - base) > 1e-4, change


def test_kl_weight_of_each_sequence():
  arrays = example()
  weights = np.array([0.0, 0.1, 0.0, 1.0, 0.5, 0.02])
  value, gradient, _ = value_and_gradient(
    arrays, CONFIG, kl_weight_B=jnp.asarray(weights, jnp.float32)
  )
  want, want_gradient = oracle(*arrays, CONFIG, weights)
  tolerances.assert_close(value, want)
  tolerances.assert_close(gradient, want_gradient)


def test_masked_tokens_may_hold_anything():
  arrays = example()
  mask = arrays[-1]
  dirty = [np.where(mask, x, bad) for x, bad in zip(arrays, (-np.inf, np.nan))]
  ref = np.where(mask, arrays[2], np.inf)
  got = value_and_gradient((*dirty, ref, *arrays[3:]), CONFIG)
  want = value_and_gradient(arrays, CONFIG)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
  assert np.all(np.asarray(got[1])[mask == 0] == 0)


def test_only_negative_drifted_sequences_are_dropped_and_keep_their_kl():
  logp, old, ref, advantages, mask = example()
  mask[:2] = 1
  arrays = (logp, old, ref, advantages, mask)
  config = dataclasses.replace(CONFIG, off_policy_threshold=0.2)
  _, gradient, metrics = value_and_gradient(arrays, config)
  drift = [
    np.mean((old - logp)[b][mask[b] > 0]) if mask[b].any() else 0
    for b in range(6)
  ]
  dropped = [d > 0.2 and a < 0 for d, a in zip(drift, advantages)]
  assert dropped[0] and drift[1] > 0.2 and not dropped[1]
  tolerances.assert_close(metrics["dropped_sequences"], np.mean(dropped))
  ratio = np.exp(logp - old)[0]
  only_kl = config.kl_weight * ratio * (logp - ref)[0] / (9 * 6)
  tolerances.assert_close(gradient[0], only_kl)


def test_parts_of_a_batch_add_up():
  arrays = example()
  whole, _, metrics = value_and_gradient(arrays, CONFIG)
  halves = [
    value_and_gradient([x[part] for x in arrays], CONFIG, num_sequences=6)
    for part in (slice(0, 2), slice(2, 6))
  ]
  tolerances.assert_close(sum(half[0] for half in halves), whole)
  for name in metrics:
    total = sum(half[2][name] for half in halves)
    tolerances.assert_close(total, metrics[name], "float32")


# The KL by enumeration: one position, every token weighed by its chance.


def enumerated(estimate):
  """Expected value and gradient (by policy logits) under the old policy."""
  generator = np.random.default_rng(3)
  policy, old, ref = 1.5 * generator.normal(size=(3, 7))

  def expected(policy_V):
    logp_V = jax.nn.log_softmax(policy_V)
    old_V, ref_V = (
      jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (old, ref)
    )
    return jnp.sum(jnp.exp(old_V) * estimate(logp_V, old_V, ref_V))

  value, gradient = jax.value_and_grad(expected)(
    jnp.asarray(policy, jnp.float32)
  )
  return value, gradient, (policy, old, ref)


def true_kl(policy, ref):
  """KL(policy, ref) and its gradient by the policy's logits, in float64."""
  p, q = (np.exp(x) / np.exp(x).sum() for x in (policy, ref))
  value = np.sum(p * np.log(p / q))
  return value, p * (np.log(p / q) - value)


def test_unbiased_kl_has_the_value_and_gradient_of_the_kl():
  value, gradient, (policy, _, ref) = enumerated(kl.unbiased_kl)
  want, want_gradient = true_kl(policy, ref)
  tolerances.assert_close(value, want)
  tolerances.assert_close(gradient, want_gradient)


def test_plain_kl_has_another_gradient_even_on_policy():
  generator = np.random.default_rng(3)
  policy, ref = 1.5 * generator.normal(size=(2, 7))
  p, q = (np.exp(x) / np.exp(x).sum() for x in (policy, ref))

  def expected(policy_V):
    logp_V = jax.nn.log_softmax(policy_V)
    ref_V = jnp.asarray(np.log(q), jnp.float32)
    return jnp.sum(jnp.asarray(p) * kl.plain_kl(logp_V, ref_V))

  value, gradient = jax.value_and_grad(expected)(
    jnp.asarray(policy, jnp.float32)
  )
  want, want_gradient = true_kl(policy, ref)
  tolerances.assert_close(value, want, "float32")
  # It is the gradient of KL(reference, policy): p - q.
  tolerances.assert_close(gradient, p - q, "float32")
  assert np.max(np.abs(np.asarray(gradient) - want_gradient)) > 0.1


def test_kl_is_exact_near_zero_and_finite_far_away():
  for gap in (1e-4, -1e-3, 3.0, 19.0, 21.0, 60.0, 200.0):
    logp, old = np.float64(-gap - 1.0), -gap - 0.5
    ref = -1.0
    got, slope = jax.value_and_grad(kl.unbiased_kl)(
      *(jnp.float32(x) for x in (logp, old, ref))
    )
    # The float32 inputs, seen in float64.
    logp, old, ref = (np.float64(np.float32(x)) for x in (logp, old, ref))
    d = ref - logp
    # Of the order of the gap: what cancels in it must not be seen.
    if gap < 80:
      want = np.exp(logp - old) * (np.expm1(d) - d)
      tolerances.assert_close(got / d, want / d, "float32")
    tolerances.assert_close(slope / d, -np.exp(logp - old), "float32")


def test_group_advantages():
  rewards = np.random.default_rng(0).normal(size=(5, 4))
  centred = rewards - rewards.mean(1, keepdims=True)
  tolerances.assert_close(grpo.group_advantages(rewards), centred, "float32")
  tolerances.assert_close(
    grpo.group_advantages(rewards, divide_by_std=True),
    centred / rewards.std(1, keepdims=True),
    "float32",
  )


@pytest.mark.parametrize("divide", [True, False])
def test_a_group_of_equal_rewards_has_no_advantage(divide):
  rewards = np.array([[0.1] * 7, [0.1, *[0.3] * 6]])
  got = grpo.group_advantages(rewards, divide_by_std=divide)
  assert np.all(np.asarray(got[0]) == 0) and np.all(np.asarray(got[1]) != 0)
  assert grpo.informative_groups(rewards).tolist() == [False, True]


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(clip_low=-0.1), "clip_low=-0.1"),
    (dict(clip_high=float("nan")), "clip_high=nan"),
    (dict(kl_weight=-1.0), "kl_weight=-1.0"),
    (dict(off_policy_threshold=-1.0), "off_policy_threshold=-1.0"),
  ],
)
def test_bad_config(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_bad_shapes():
  arrays = [jnp.asarray(x, jnp.float32) for x in example()]
  with pytest.raises(ValueError, match=r"advantages_B\.shape"):
    grpo.grpo_loss(*arrays[:3], arrays[3][:, None], arrays[4], CONFIG)
  with pytest.raises(ValueError, match="one and the same"):
    grpo.grpo_loss(*arrays[:2], arrays[2][:, 1:], *arrays[3:], CONFIG)
  with pytest.raises(ValueError, match=r"must be \[P, G\]"):
    grpo.group_advantages(np.zeros(4))


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_trajectory_count_as_one_sequence(seed, threshold):
  """The oracle sees each trajectory whole, the loss sees it cut up."""
  config = dataclasses.replace(CONFIG, off_policy_threshold=threshold)
  logp, old, ref, advantages, mask = example(seed)
  # Trajectory 0 is cut in three, 1 in two, the others lie in one row. Only as a
  # whole is 0 off-policy: its last part has not drifted.
  logp[0, 6:] = old[0, 6:]
  cuts = {0: (0, 3, 6, 9), 1: (0, 5, 9)}
  pieces = [
    (number, begin, end)
    for number in range(6)
    for begin, end in itertools.pairwise(cuts.get(number, (0, 9)))
  ]
  order = np.random.default_rng(seed).permutation(len(pieces))
  pieces = [pieces[place] for place in order]

  def cut(x):
    rows = np.full((len(pieces), 9), np.nan)
    for row, (number, begin, end) in enumerate(pieces):
      rows[row, : end - begin] = x[number, begin:end]
    return rows

  trajectory = np.array([number for number, *_ in pieces])
  value, gradient, metrics = value_and_gradient(
    (
      *map(cut, (logp, old, ref)),
      advantages[trajectory],
      np.nan_to_num(cut(mask)),
    ),
    config,
    num_sequences=6,
    trajectory_B=jnp.asarray(trajectory),
  )
  whole = logp, old, ref, advantages, mask
  want, want_gradient = oracle(*whole, config)
  tolerances.assert_close(value, want)
  tolerances.assert_close(gradient, np.nan_to_num(cut(want_gradient)))
  _, _, want_metrics = value_and_gradient(whole, config)
  for name in want_metrics:
    tolerances.assert_close(metrics[name], want_metrics[name])
