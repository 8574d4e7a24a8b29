"""Runs of single answers and episodes at once, in both modes."""

import dataclasses
import itertools
import os
import signal

import numpy as np
import pytest

from dsv32_jax.agents import limits
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import episodes
from dsv32_jax.rl import loop
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import run_config
from dsv32_jax.training import metrics
from dsv32_jax.training import run
from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks
from dsv32_jax.verifiers.tasks import mixture
from tests.support import rl_runs
from tests.support import scorers

DOMAINS = {"sorting", "sorting_thinking", "calculator", "calculator_thinking"}


def mixed_run(**changes):
  sorting = mixture.TaskConfig(
    kind="sorting", size=2, largest=9, thinking=False
  )
  calculator = episode_config.EnvironmentConfig(
    kind="calculator", size=2, largest=9, thinking=False
  )
  defaults = dict(
    tasks=(
      sorting,
      dataclasses.replace(sorting, name="sorting_thinking", thinking=True),
    ),
    episodes=episode_config.EpisodesConfig(
      environments=(
        calculator,
        dataclasses.replace(
          calculator, name="calculator_thinking", thinking=True
        ),
      ),
      limits=limits.EpisodeLimits(turns=2, window=160, turn_tokens=12),
      tool_descriptions="signatures",
      length=length.LengthPenalty(free_tokens=0, max_tokens=40),
    ),
    reward=reward.RewardConfig(format_weight=0.5),
    prompts=4,
    episode_prompts=2,
    rollouts=4,
    evaluation=run_config.EvaluationConfig(every=2, problems=8),
  )
  # The tokenizer's words are short: it has few, of both kinds.
  base = rl_runs.config()
  engine = dataclasses.replace(base.sampler.engine, max_length=160)
  defaults |= dict(
    model=dataclasses.replace(base.model, max_length=160),
    sampler=dataclasses.replace(base.sampler, engine=engine),
    row_lengths=(159,),
  )
  return rl_runs.config(**(defaults | changes))


def train(config, folder):
  return loop.train(config, str(folder), scorer=scorers.by_text)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_mixed_run_that_stopped_goes_on_bitwise(
  tmp_path, monkeypatch, fresh_models_play
):
  learn, seen = policy_lib.Policy.learn, []

  def kept(self, rollout):
    seen.append(rollout)
    return learn(self, rollout)

  monkeypatch.setattr(policy_lib.Policy, "learn", kept)
  config = mixed_run()
  whole = train(config, tmp_path / "whole")
  rollouts, calls = list(seen), itertools.count(1)

  def counted(self, rollout):
    if next(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return learn(self, rollout)

  monkeypatch.setattr(policy_lib.Policy, "learn", counted)
  with pytest.raises(run.Stopped, match="rollout 2 of 4"):
    train(config, tmp_path / "parts")
  again = train(config, tmp_path / "parts")
  rl_runs.assert_equal_runs(tmp_path, whole, again)
  rows = metrics.read_rows(tmp_path / "whole" / "metrics.jsonl")
  held_out = [row for row in rows if row["name"] == "held_out"]
  assert [row["version"] for row in held_out] == [0, 2, 4]
  for row in held_out:
    assert {f"pass_at_1_{name}" for name in DOMAINS} <= row.keys()
  # Learnt from: both kinds, the modes as their configs say.
  learned = [row for row in rows if row["name"] == "train"]
  assert all(row["steps"] and row["gradient_norm"] > 0 for row in learned)
  assert all(abs(row["log_old_over_new"]) < 0.05 for row in learned)
  start, end = (
    whole.tokenizer.special_id(name) for name in ("think_start", "think_end")
  )
  found = set()
  for rollout in rollouts:
    domains = [group[0].domain for group in rollout.groups]
    assert [name.startswith("calculator") for name in domains] == [
      *(False, False),
      *(True, True),
    ]
    found |= set(domains)
    for one in itertools.chain(*rollout.groups):
      part = one.parts[0]
      first = int(part.token_ids_N[np.argmax(part.written_N) - 1])
      assert first == (start if one.domain.endswith("thinking") else end)
  assert len(found) > 2 and found <= DOMAINS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_mixed_run_side_by_side_with_learning(tmp_path, fresh_models_play):
  config = mixed_run(max_staleness=1, rollouts=3)
  policy = train(config, tmp_path)
  assert policy.version == 3
  rows = metrics.read_rows(tmp_path / "metrics.jsonl")
  learned = [row for row in rows if row["name"] == "train"]
  assert [row["step"] for row in learned] == [1, 2, 3]
  assert all(row["staleness"] <= 1 for row in learned)
  assert all("turns" in row and "failed_scores" in row for row in learned)


def test_the_same_problem_is_put_in_either_mode():
  config = mixed_run()
  mine = tasks.Mixture(config.tasks, split="train", seed=0)
  plain = tasks.Mixture(
    [dataclasses.replace(x, name="", thinking=None) for x in config.tasks],
    split="train",
    seed=0,
  )
  drawn = [mine.drawn(number) for number in range(20)]
  assert [x for _, x in drawn] == [plain.problem(n) for n in range(20)]
  modes = {(one.domain, one.thinking) for one, _ in drawn}
  assert modes == {("sorting", False), ("sorting_thinking", True)}


@pytest.mark.parametrize("thinking", [True, False])
def test_an_environment_decides_its_mode(thinking):
  config = mixed_run().episodes
  chosen = [x for x in config.environments if x.thinking is thinking]
  task = environments.Tasks(chosen, split="train", seed=0).task(0)
  assert task.thinking is thinking
  assert task.domain in DOMAINS
  want = "thinking" if thinking else "chat"
  assert episodes.thinking_mode(config, task) == want
  free = dataclasses.replace(task, thinking=None)
  assert episodes.thinking_mode(config, free) == config.thinking_mode


def test_the_format_is_that_of_the_problems_mode():
  problem = next(
    tasks.generate(mixed_run().tasks[0].make(), split="train", seed=0)
  )
  box = f"\\boxed{{{problem.answer}}}"
  config = reward.RewardConfig(format_weight=1.0)

  def value(response, thinking):
    answer = reward.Answer(
      problem=problem, response=response, num_tokens=1, thinking=thinking
    )
    return reward.score(answer, config).value

  assert value(box, None) == value(box, False) == 2
  assert value(box, True) == value(f"a</think>{box}", False) == 1
  assert value(f"a</think>{box}", True) == 2


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(episode_prompts=None), "episode_prompts=None must be 1 to 3"),
    (dict(episode_prompts=4), "episode_prompts=4 must be 1 to 3"),
    (dict(episode_prompts=0), "episode_prompts=0 must be 1 to 3"),
    (dict(tasks=(), reward=reward.RewardConfig()), "episode_prompts=2 is for"),
    (dict(episodes=None), "episode_prompts=2 is for"),
  ],
)
def test_bad_mixed_runs(change, message):
  with pytest.raises(ValueError, match=message):
    mixed_run(**change)
