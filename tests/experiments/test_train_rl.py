"""The RL program: its configs, its mistakes in one line, a run of it."""

import pytest

from configs import deepseek_v32_671b
from configs import rl
from dsv32_jax import config_files
from dsv32_jax.rl import run_config
from dsv32_jax.training import metrics
from tests.support import programs

SMALL = (
  "--config.rollouts=2",
  "--config.prompts=2",
  "--config.group_size=2",
  "--config.evaluation.problems=2",
  "--config.sampler.max_tokens=4",
)


def run_program(workdir, *flags):
  return programs.run("train_rl", "rl.py:tiny", workdir, *flags)


@pytest.mark.parametrize(
  "variant",
  [
    "tiny",
    "tiny_async",
    "small",
    "calculator",
    "calculator_async",
    "lookups",
    "repairs",
    "searches",
  ],
)
def test_configs_hold_runs(variant):
  config = config_files.build(run_config.RlConfig, rl.get_config(variant))
  assert config.asynchronous == variant.endswith("_async")


def test_the_671b_variant_is_a_run():
  given = deepseek_v32_671b.get_config("grpo")
  config = config_files.build(run_config.RlConfig, given)
  # A sequence of a minibatch for each group of devices that shares one.
  assert config.rows == config.mesh.fsdp * config.mesh.expert
  assert config.learner.uses_reference and config.learner.keep_routing


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.group_size=1", "group_size=1"),
    ("--config.sampler.engine.max_length=100", "row_lengths=(63,)"),
    ("--config.weights_every=3", "rollouts=200"),
    ("--config.weights_every=8", "checkpoint.every_steps=20"),
    ("--config.learner.temperature=0.0", "temperature=0.0"),
    ("--config.learner.keep_rooting=True", "keep_rooting"),
  ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, flag, message):
  done = run_program(tmp_path / "run", flag)
  assert done.returncode == 1
  assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_it_runs(tmp_path):
  done = run_program(tmp_path / "run", *SMALL)
  assert done.returncode == 0, done.stderr
  assert "2 rollouts learned" in done.stdout
  rows = metrics.read_rows(tmp_path / "run" / "metrics.jsonl")
  names = [(row["step"], row["name"]) for row in rows]
  assert names == [(1, "held_out"), (1, "train"), (2, "train"), (3, "held_out")]
  timings = metrics.read_rows(tmp_path / "run" / "timings.jsonl")
  for phase in ("sampling", "scoring", "learning"):
    assert all(row[f"{phase}_seconds"] > 0 for row in timings)
