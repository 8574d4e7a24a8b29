"""Rollouts cut into minibatches, and a policy that learns from its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.generation import requests
from dsv32_jax.rl import config as rl_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import learner
from dsv32_jax.rl import rollout
from dsv32_jax.rl import trajectory as trajectory_lib
from dsv32_jax.training import step as step_lib
from tests.support import models
from tests.support import rollouts
from tests.support import stage_steps

# N tokens of a trajectory, P prompts, G answers a prompt

MODEL = models.tiny_config()
CONFIG = rl_config.LearnerConfig(
  grpo=grpo.GrpoConfig(
    clip_low=0.2, clip_high=0.2, kl_weight=0.1, off_policy_threshold=0.5
  ),
  domain_kl_weights=(("math", 0.0),),
)
REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]


def trajectory(first, domain=""):
  """One that its first token names."""
  return rollouts.of_one_part(
    token_ids_N=np.array([first, 3, 4]),
    written_N=np.array([False, True, True]),
    logp_N=np.array([0.0, -1.0, -1.0]),
    domain=domain,
  )


def groups():
  return [
    [trajectory(3 * p + g, "math" if p == 2 else "chat") for g in range(3)]
    for p in range(4)
  ]


def cut(config, seed=0, **kwargs):
  return rollout.minibatches(
    groups(), REWARDS, config, MODEL, lengths=(2,), seed=seed, **kwargs
  )


def rows(batches):
  """Of each first token: its advantage and its KL weight."""
  return {
    int(batch.batch.tokens_BT[row, 0]): (
      float(batch.advantages_B[row]),
      float(batch.kl_weight_B[row]),
    )
    for batch in batches
    for row in range(int(batch.num_sequences))
  }


def wanted(kept_groups):
  return {
    3 * p + g: (REWARDS[p][g] - np.mean(REWARDS[p]), 0.0 if p == 2 else 0.1)
    for p in kept_groups
    for g in range(3)
  }


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("drop", [True, False])
def test_minibatches_hold_each_answer_once(count, drop):
  config = dataclasses.replace(
    CONFIG, minibatches=count, drop_equal_groups=drop
  )
  batches = cut(config)
  assert len(batches) == count
  want = wanted([0, 2] if drop else range(4))
  assert sum(int(batch.num_sequences) for batch in batches) == len(want)
  got = rows(batches)
  assert set(got) == set(want)
  for name in want:
    assert got[name] == pytest.approx(want[name])
  assert len({batch.batch.tokens_BT.shape for batch in batches}) == 1


def test_the_shuffle_is_the_seeds():
  config = dataclasses.replace(CONFIG, minibatches=2)
  first = [set(rows([batch])) for batch in cut(config)]
  assert first == [set(rows([batch])) for batch in cut(config)]
  assert first != [set(rows([batch])) for batch in cut(config, seed=1)]


def test_r1_advantages():
  config = dataclasses.replace(CONFIG, divide_by_std=True)
  got = rows(cut(config))
  assert got[0][0] == pytest.approx((1 - 1 / 3) / np.std([1, 0, 0]))


def test_nothing_to_learn():
  config = dataclasses.replace(CONFIG, drop_equal_groups=True)
  equal = np.zeros((4, 3)).tolist()
  assert not rollout.minibatches(
    groups(), equal, config, MODEL, lengths=(2,), seed=0
  )


def test_what_does_not_fit():
  def given(rewards):
    return rollout.minibatches(
      groups(), rewards, CONFIG, MODEL, lengths=(2,), seed=0
    )

  with pytest.raises(ValueError, match="must be P times G"):
    given(REWARDS[:3])
  with pytest.raises(ValueError, match="not finite"):
    given([[float("nan")] * 3] * 4)


def completion(**changes):
  values = dict(
    request_id="a",
    prompt_ids=(5, 6),
    token_ids=(7, 8, 1),
    logprobs=(-0.1, -0.2, -0.3),
    finish_reason="stop",
    kept=(np.array([7, 9]), None, np.array([1])),
    experts_LNA=np.arange(2 * 4 * 3).reshape(2, 4, 3) % 8,
  )
  return requests.Completion(**(values | changes))


def test_a_completion_becomes_a_trajectory():
  whole = trajectory_lib.from_completion(completion(), domain="math")
  (one,) = whole.parts
  assert one.token_ids_N.tolist() == [5, 6, 7, 8, 1]
  assert one.written_N.tolist() == [False, False, True, True, True]
  assert one.logp_N[2:].tolist() == [-0.1, -0.2, -0.3]
  assert one.kept[2].tolist() == [7, 9] and one.kept[3] is None
  assert whole.domain == "math" and one.experts_LNA.shape == (2, 4, 3)
  plain = trajectory_lib.from_completion(completion(kept=(None,) * 3))
  assert plain.parts[0].kept is None
  with pytest.raises(ValueError, match="'a' drew no token"):
    trajectory_lib.from_completion(
      completion(token_ids=(), logprobs=(), kept=())
    )


@pytest.mark.slow
def test_a_policy_learns_what_is_rewarded():
  """Half of the vocabulary is rewarded; chance alone gives about half."""
  model = models.tiny_model(num_layers=2, num_mtp_layers=0)
  config = dataclasses.replace(
    CONFIG,
    stage=rl_config.INDEXER_FROZEN,
    minibatches=2,
    reference_every=5,
    drop_equal_groups=True,
  )
  optimizer = stage_steps.make_optimizer(peak=1e-2, weight_decay=0.0)
  graph, state = step_lib.init_state(model, config.stage, optimizer)
  reference = learner.snapshot(state)
  step = learner.make_learner_step(graph, config, optimizer)
  score = learner.make_reference_scorer(graph, config)
  mean_rewards = []
  for turn in range(12):
    policy = step_lib.merge_model(graph, jax.tree.map(jnp.copy, state))
    answers = rollouts.rollout(
      policy, rows=16, length=rollouts.PROMPT + 3, top_p=0.95, seed=turn
    )
    rewards = [
      np.mean(one.parts[0].token_ids_N[rollouts.PROMPT :] < 30)
      for one in answers
    ]
    mean_rewards.append(np.mean(rewards))
    batches = rollout.minibatches(
      [answers[:8], answers[8:]],
      [rewards[:8], rewards[8:]],
      config,
      model.config,
      lengths=(rollouts.PROMPT + 2,),
      seed=turn,
    )
    state, reference, metrics = learner.learn(
      step, score, config, state, reference, batches
    )
    assert all(np.isfinite(row["loss"]) for row in metrics)
  assert np.mean(mean_rewards[:2]) < 0.7
  assert np.mean(mean_rewards[-2:]) > 0.9, mean_rewards
