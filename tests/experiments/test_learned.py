"""The program that measures what episodes teach."""

import json

import numpy as np
import pytest

from configs import learned as configs
from dsv32_jax import config_files
from dsv32_jax.rl import environments
from dsv32_jax.rl import learned
from tests.support import programs


def run_program(workdir, *flags):
  return programs.run(
    "learned", "learned.py:smoke", workdir, *flags, timeout=1500
  )


@pytest.mark.parametrize(
  "variant",
  ["lookups", "renamed", "calculator", "repairs", "searches", "smoke"],
)
def test_configs_keep_families_apart(variant):
  config = config_files.build(
    learned.LearnedConfig, configs.get_config(variant)
  )
  seen = {d for e in config.rl.episodes.environments for d in e.domains}
  unseen = {d for e in config.unseen for d in e.domains}
  assert not seen & unseen
  assert bool(unseen) == (variant in ("lookups", "renamed", "smoke"))


def test_a_report_by_hand():
  # Imported here: its required flags are forgotten after the test.
  from experiments import learned as program

  found = {
    "domains": {"seen": ["a", "a", "b", "b"]},
    "sft": {"seen": [0.0, 0.0, 1.0, 0.0]},
    "grpo": {"seen": [1.0, 0.0, 1.0, 1.0]},
  }
  report = program.summarize(found)["seen"]
  assert report["sft"]["solved"] == 1 and report["grpo"]["share"] == 0.75
  # Wilson's interval of 1 in 4, from its formula.
  z, n, p = 1.959964, 4, 0.25
  centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
  np.testing.assert_allclose(
    report["sft"]["interval"], [centre - half, centre + half], rtol=1e-6
  )
  change = np.array([1, 0, 0, 1])
  error = 1.96 * np.std(change, ddof=1) / 2
  np.testing.assert_allclose(
    report["change"]["interval"], [0.5 - error, 0.5 + error], rtol=1e-6
  )
  assert report["domains"]["b"]["grpo"]["solved"] == 2


def test_a_mistake_is_told_in_one_line(tmp_path):
  done = run_program(tmp_path / "run", "--config.solved=0")
  assert done.returncode == 1
  assert "solved=0" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_and_goes_on(tmp_path):
  done = run_program(tmp_path / "run")
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  for group in ("seen", "unseen"):
    assert report[group]["grpo"]["asked"] == 4
    assert f"{group} families after grpo" in done.stdout
  assert [row["version"] for row in report["curve"]] == [0, 1]
  rl = config_files.build(learned.LearnedConfig, configs.get_config("smoke")).rl
  rows = (tmp_path / "run" / learned.SOLVED_FILE).read_text().splitlines()
  drawn = environments.Tasks(
    rl.episodes.environments, split="train", seed=rl.seed
  )
  practised = {drawn.task(n).id for n in range(rl.rollouts * rl.prompts)}
  assert not practised & {json.loads(row)["id"] for row in rows}
  again = run_program(tmp_path / "run")
  assert again.returncode == 0 and again.stdout == done.stdout
