"""Rewards of answers: their parts, and scorers that misbehave."""

import dataclasses

import pytest

from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks
from tests.support import scorers

MIXTURE = tasks.Mixture(
  [tasks.TaskConfig(kind="arithmetic", size=2)], split="train", seed=0
)


def answer(response=None, num_tokens=5, number=0):
  problem = MIXTURE.problem(number)
  if response is None:
    response = f"\\boxed{{{problem.answer}}}"
  return reward.Answer(
    problem=problem, response=response, num_tokens=num_tokens
  )


def test_the_parts_add_up():
  config = reward.RewardConfig(
    thinking=True,
    format_weight=0.5,
    language="en",
    language_weight=0.25,
    length=length.LengthPenalty(free_tokens=4, max_tokens=8, weight=2.0),
  )
  right = answer().response
  cases = {
    # outcome, format, language, length
    f"two \u0434\u0432\u0430</think>{right}": 1 + 0.5 + 0.125 - 0.5,
    f"two</think>{right}": 1 + 0.5 + 0.25 - 0.5,
    "two</think>\\boxed{none}": 0 + 0.5 + 0.25 - 0.5,
    f"two {right}": 1 + 0 + 0.25 - 0.5,
  }
  for response, want in cases.items():
    found = reward.score(answer(response), config)
    assert found.value == pytest.approx(want), response
    assert found.outcome == float(right in response) and not found.error
  plain = reward.score(answer(), reward.RewardConfig())
  assert plain.value == plain.outcome == 1.0


def test_a_scorer_that_fails_costs_that_answer_alone():
  rewarder = reward.Rewarder(
    reward.RewardConfig(),
    num_workers=2,
    timeout_seconds=2.0,
    function=scorers.unruly,
  )
  answers = [answer("x", num_tokens=n) for n in range(6)]
  with rewarder:
    found = rewarder.score(answers)
  for one, message in zip(
    found,
    ("crash", "timeout", "RuntimeError: no mood", "not finite", "no reward"),
  ):
    assert (one.value, one.outcome) == (0.0, 0.0) and message in one.error
  good = scorers.by_text(answers[5], reward.RewardConfig())
  assert good == found[5] and good.value > 0


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(format_weight=-1.0), "format_weight=-1.0"),
    (dict(language_weight=0.1), "without reward.language"),
    (dict(language="xx"), "language='xx'"),
  ],
)
def test_bad_config(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(reward.RewardConfig(), **change)
