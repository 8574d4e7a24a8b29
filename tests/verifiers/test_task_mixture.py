"""The numbered stream of problems: addressable, mixed, without held-out."""

import collections
import itertools

import pytest

from dsv32_jax.verifiers import tasks

CONFIGS = (
  tasks.TaskConfig(kind="arithmetic", size=2, weight=3.0),
  tasks.TaskConfig(kind="sorting", size=3),
  tasks.TaskConfig(kind="brackets", size=6),
  tasks.TaskConfig(kind="knights", size=2),
)


def contents(split, count=1200, seed=0):
  mixture = tasks.Mixture(CONFIGS, split=split, seed=seed)
  return [mixture.problem(number) for number in range(count)]


def test_a_problem_follows_from_its_number():
  mixture = tasks.Mixture(CONFIGS, split="train", seed=0)
  backwards = [mixture.problem(number) for number in range(49, -1, -1)]
  assert backwards[::-1] == contents("train", 50)
  assert contents("train", 50, seed=1) != contents("train", 50)


def test_tasks_come_by_weight():
  counts = collections.Counter(one.task for one in contents("train"))
  assert abs(counts["arithmetic"] / 1200 - 0.5) < 0.05
  assert all(abs(counts[k] / 1200 - 1 / 6) < 0.04 for k in ("sorting",))


def test_training_never_holds_what_is_held_out():
  trained = {(one.task, one.content) for one in contents("train", 3000)}
  for config in CONFIGS:
    held_out = tasks.generate(config.make(), split="held_out", seed=5)
    for one in itertools.islice(held_out, 50):
      assert (one.task, one.content) not in trained


def test_bad_mixtures():
  with pytest.raises(ValueError, match="tasks is empty"):
    tasks.Mixture((), split="train", seed=0)
  with pytest.raises(ValueError, match="must be train or held_out"):
    tasks.Mixture(CONFIGS, split="all", seed=0)
  with pytest.raises(ValueError, match=r"weight=0\.0 of sorting"):
    tasks.TaskConfig(kind="sorting", size=3, weight=0.0)
  with pytest.raises(ValueError, match="people=9"):
    tasks.TaskConfig(kind="knights", size=9)
