"""Runs of GRPO that stop and go on, taking turns and side by side."""

import json
import os
import pathlib
import signal

import jax
import pytest

from dsv32_jax import config_files
from dsv32_jax import sharding
from dsv32_jax.data import tokenizer
from dsv32_jax.rl import loop
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.training import checkpoint
from dsv32_jax.training import metrics
from dsv32_jax.training import run
from tests.support import rl_runs
from tests.support import scorers


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Runs see one of the eight devices."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1])
  )


def train(config, folder):
  return loop.train(config, str(folder), scorer=scorers.by_text)


def stop_after(monkeypatch, calls):
  """The process is asked to stop while it learns from a rollout."""
  learn, seen = policy_lib.Policy.learn, []

  def counted(self, rollout):
    seen.append(rollout.number)
    if len(seen) == calls:
      os.kill(os.getpid(), signal.SIGTERM)
    return learn(self, rollout)

  monkeypatch.setattr(policy_lib.Policy, "learn", counted)
  return seen


def rows(folder, name="train"):
  found = metrics.read_rows(pathlib.Path(folder) / "metrics.jsonl")
  return [row for row in found if row["name"] == name]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  # With weights handed over every other rollout, it stops where one is due.
  "weights_every, stops_at",
  [(1, 3), (2, 4)],
)
def test_a_run_that_stopped_goes_on_bitwise(
  tmp_path, monkeypatch, weights_every, stops_at
):
  config = rl_runs.config(rollouts=6, weights_every=weights_every)
  whole = train(config, tmp_path / "whole")
  seen = stop_after(monkeypatch, 3)
  with pytest.raises(run.Stopped, match=f"rollout {stops_at} of 6"):
    train(config, tmp_path / "parts")
  again = train(config, tmp_path / "parts")
  assert seen == [0, 1, 2, 3, 4, 5]
  rl_runs.assert_equal_runs(tmp_path, whole, again)
  found = rows(tmp_path / "whole")
  assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
  assert [row["staleness"] for row in found] == [
    number % weights_every for number in range(6)
  ]
  assert any(row["steps"] == 2 and row["gradient_norm"] > 0 for row in found)
  # Three answers of four find their prompt's first chunks computed.
  timings = metrics.read_rows(tmp_path / "whole" / "timings.jsonl")
  assert all(0 < row["shared_prompt_tokens"] < 0.75 for row in timings)
  held_out = rows(tmp_path / "whole", "held_out")
  assert [row["version"] for row in held_out] == [
    0,
    2,
    4,
    6,
  ]
  assert {"pass_at_1_sorting", "pass_at_1_arithmetic"} <= held_out[0].keys()


def test_what_a_command_left_that_failed_is_no_tokenizer(tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.train(["zz"] * 5, rl_runs.VOCAB).save(path)
  foreign = path.read_bytes()
  policy_lib.Policy(rl_runs.config(), str(tmp_path)).close()
  assert path.read_bytes() != foreign
  # Where a run has begun, its tokenizer stays.
  path.write_bytes(foreign)
  (tmp_path / "config.json").write_text("{}")
  policy_lib.Policy(rl_runs.config(), str(tmp_path)).close()
  assert path.read_bytes() == foreign


def test_another_config_is_told_before_anything_is_restored(tmp_path):
  config = rl_runs.config()
  changed = json.loads(json.dumps(config_files.dump(config)))
  changed["model"]["width"] = 2 * config.model.width
  (tmp_path / "config.json").write_text(json.dumps(changed))
  with pytest.raises(ValueError, match=r"another config\.model"):
    loop.train(config, str(tmp_path))
  assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(group_size=1), "group_size=1"),
    (dict(weights_every=2), "rollouts=5 must be a multiple"),
    (dict(weights_every=3, rollouts=6), r"checkpoint\.every_steps=2"),
    (dict(weights_every=2, max_staleness=1), "goes with max_staleness=0"),
    (dict(max_staleness=-1), "max_staleness=-1"),
    (dict(seed=-1), "^seed=-1"),
    (dict(row_lengths=(64,)), "max_length=96"),
    (dict(microbatches=4), "microbatches=4 does not divide the 6 rows"),
    (dict(checkpoint=checkpoint.CheckpointConfig(keep_best=1)), "keep_best=1"),
  ],
)
def test_bad_config(change, message):
  with pytest.raises(ValueError, match=message):
    rl_runs.config(**change)
