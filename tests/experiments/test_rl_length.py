"""The length study, run small as its users run it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_both_arms_are_reported(tmp_path):
  finished = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.rl_length"),
      "--config=configs/rl_length.py:smoke",
      f"--workdir={tmp_path}",
    ],
    check=False,
    capture_output=True,
    text=True,
    timeout=290,
    env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
  )
  assert finished.returncode == 0, finished.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  arms = ["no penalty", "length penalty"]
  assert [arm for arm in report if arm != "curves"] == arms
  starts = [report[arm]["answer_tokens"]["start"] for arm in arms]
  # From one model, on the same problems with the same draws.
  assert starts[0] == starts[1]
  for name in ("pass_at_1", "answer_tokens"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  for folder, penalty in (("no_penalty", None), ("length_penalty", 0.3)):
    path = tmp_path / "seed_0" / folder / "config.json"
    length = json.loads(path.read_text())["reward"]["length"]
    assert (length and length["weight"]) == penalty
