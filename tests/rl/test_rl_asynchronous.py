"""Sampling beside learning: order, bound, and what a kill leaves."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

from flax import nnx
import jax
import pytest

from dsv32_jax import sharding
from dsv32_jax.rl import asynchronous
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import sampling
from dsv32_jax.verifiers import tasks
from tests.support import rl_until_killed

ROOT = pathlib.Path(__file__).resolve().parents[2]


class FakePolicy:
  """Has a version, which is its only parameter as well."""

  def __init__(self, rollouts, staleness):
    self.config = types.SimpleNamespace(
      rollouts=rollouts, max_staleness=staleness
    )
    self.mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    self.version = 0

  def model(self):
    return nnx.Dict(version=nnx.Param(jax.numpy.full((), self.version)))

  def learn(self):
    self.version += 1


class FakeSampler:
  """Gives (number, version), and remembers when it began each."""

  def __init__(self, seconds=0.0, broken_at=None):
    self.begun, self.seconds, self.broken_at = [], seconds, broken_at
    self.version = None

  def load(self, model, version):
    assert int(model["version"][...]) == version
    self.version = version

  def rollout(self, number):
    self.begun.append(number)
    if number == self.broken_at:
      raise RuntimeError("no more")
    time.sleep(self.seconds)
    return number, self.version


@pytest.mark.parametrize("staleness", [1, 2, 4])
@pytest.mark.parametrize("sampling_s, learning_s", [(0, 0.05), (0.05, 0)])
def test_rollouts_come_in_order_and_never_too_stale(
  staleness, sampling_s, learning_s
):
  policy, sampler = FakePolicy(10, staleness), FakeSampler(sampling_s)
  seen = []
  for number, version in asynchronous.rollouts(policy, sampler):
    assert policy.version - version <= staleness
    # Nothing is begun that would be too stale when its turn comes.
    assert max(sampler.begun) <= policy.version + staleness
    seen.append((number, policy.version - version))
    time.sleep(learning_s)
    policy.learn()
  assert [number for number, _ in seen] == list(range(10))
  if learning_s:
    # A fast sampler runs ahead as far as it may.
    assert [lag for _, lag in seen[staleness:]] == [staleness] * (
      10 - staleness
    )


def test_they_overlap():
  policy, sampler = FakePolicy(8, 1), FakeSampler(0.1)
  start = time.monotonic()
  for _ in asynchronous.rollouts(policy, sampler):
    time.sleep(0.1)
    policy.learn()
  assert time.monotonic() - start < 1.4  # 1.6 if they took turns


def test_a_failure_of_the_sampler_is_raised_in_its_turn():
  policy, sampler = FakePolicy(10, 3), FakeSampler(broken_at=2)
  seen = []
  with pytest.raises(RuntimeError, match="no more"):
    for number, _ in asynchronous.rollouts(policy, sampler):
      seen.append(number)
      policy.learn()
  assert seen == [0, 1]
  assert not [t for t in threading.enumerate() if t.name == "sampling"]


def test_closing_ends_the_thread():
  policy, sampler = FakePolicy(100, 2), FakeSampler(0.01)
  rollouts = asynchronous.rollouts(policy, sampler)
  next(rollouts)
  rollouts.close()
  assert not [t for t in threading.enumerate() if t.name == "sampling"]
  assert max(sampler.begun) <= 2


def learned(folder):
  path = folder / "learned.jsonl"
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_loses_and_repeats_no_prompt(tmp_path):
  command = [sys.executable, "-m", "tests.support.rl_until_killed", tmp_path]
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
  }
  process = subprocess.Popen(command, cwd=ROOT, env=environment)
  deadline = time.monotonic() + 400
  # Once a checkpoint is there, in the middle of what follows it.
  while len(learned(tmp_path)) < 4:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  before = learned(tmp_path)
  subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400)
  after = learned(tmp_path)[len(before) :]
  resumed_at = after[0][0]
  assert 0 < resumed_at <= len(before)
  # What the final policy has learned from.
  lineage = before[:resumed_at] + after
  config = rl_until_killed.config()
  assert [row[0] for row in lineage] == list(range(config.rollouts))
  assert all(0 <= row[0] - row[1] <= config.max_staleness for row in lineage)
  assert any(row[0] > row[1] for row in lineage)
  problems = tasks.Mixture(config.tasks, split="train", seed=config.seed)
  tokenizer = policy_lib.make_tokenizer(config)
  want = [
    sampling.prompt_ids(
      problems.problem(number).question, tokenizer, thinking=False
    )
    for number in range(config.rollouts * config.prompts)
  ]
  assert [ids for row in lineage for ids in row[2]] == want
