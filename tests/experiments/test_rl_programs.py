"""The comparisons of RL, run small as their users run them."""

import json

import pytest

from tests.support import programs


def run(program, workdir):
  """Runs the smoke variant of a program; returns its report."""
  finished = programs.run(program, f"{program}.py:smoke", workdir)
  assert finished.returncode == 0, finished.stderr
  return json.loads((workdir / "report.json").read_text())


@pytest.mark.slow
def test_both_arms_of_the_length_study_are_reported(tmp_path):
  workdir = tmp_path / "before"
  report = run("rl_length", workdir)
  arms = ["no penalty", "length penalty"]
  assert [arm for arm in report if arm != "curves"] == arms
  starts = [report[arm]["answer_tokens"]["start"] for arm in arms]
  # From one model, on the same problems with the same draws.
  assert starts[0] == starts[1]
  for name in ("pass_at_1", "answer_tokens"):
    assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  for folder, penalty in (("no_penalty", None), ("length_penalty", 0.3)):
    path = workdir / "seed_0" / folder / "config.json"
    length = json.loads(path.read_text())["reward"]["length"]
    assert (length and length["weight"]) == penalty
  # Moved, it goes on: what is asked for again begins where its parts lie now.
  moved = workdir.rename(tmp_path / "after")
  for name in ("start", "no_penalty"):
    (moved / "seed_0" / f"{name}.json").unlink()
  again = run("rl_length", moved)
  for arm in arms:
    assert again[arm]["pass_at_1"] == report[arm]["pass_at_1"]


@pytest.mark.slow
def test_grpo_and_further_fine_tuning_begin_with_the_best(tmp_path):
  report = run("rl_shown", tmp_path)
  (curves,), (found,) = report["curves"], report["pass_at_1"]
  assert found["start"] == max(point["pass_at_1"] for point in curves["sft"])
  for part in ("grpo", "further_sft"):
    assert curves[part][0]["pass_at_1"] == found["start"]
    assert curves[part][0]["seconds"] == 0
  assert [point["step"] for point in curves["grpo"]] == [0, 2]
  assert curves["further_sft"][-1]["seconds"] >= curves["grpo"][-1]["seconds"]
  assert found["grpo"] == curves["grpo"][-1]["pass_at_1"]
  assert (tmp_path / "pass_at_1.png").read_bytes().startswith(b"\x89PNG")
  # Called again, nothing is done again.
  assert run("rl_shown", tmp_path) == report
