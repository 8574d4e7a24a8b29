"""The whole of post-training, run small as its users run it."""

import json

import pytest

from tests.support import programs


def post_train(workdir, *arguments):
  return programs.run(
    "post_train", "post_training.py:smoke", workdir, *arguments, timeout=1500
  )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_model_is_reported_in_every_domain_and_mode(tmp_path):
  finished = post_train(tmp_path)
  assert finished.returncode == 0, finished.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  names = ["sorting_thinking", "sorting_chat", "calculator_chat"]
  stages = ["sequential_1_reasoning", "sequential_2_agent"]
  models = ["start", *names, "distilled", "mixed", *stages]
  assert list(report["pass_at_1"]) == models
  for found in report["pass_at_1"].values():
    assert list(found) == ["all", *names]
  assert report["orders"] == {
    "mixed": ["distilled", "mixed"],
    "sequential": ["distilled", *stages],
  }
  for counts in report["distilled"].values():
    assert counts["mixed"] <= counts["accepted"] <= counts["answers"] == 12
  assert (tmp_path / "pass_at_1.png").read_bytes().startswith(b"\x89PNG")
  assert "forgotten" in (tmp_path / "report.md").read_text()
  # As the config has it: there is nothing for an indexer to choose.
  for name in ("start", "distilled"):
    made = json.loads((tmp_path / name / "config.json").read_text())
    assert made["stage"]["trains"] == "model"
  # Only accepted answers are learnt from, and what is learnt is the model's.
  rows = (tmp_path / "distillation" / "sft.jsonl").read_text().splitlines()
  assert rows
  for row in map(json.loads, rows):
    roles = [message["role"] for message in json.loads(row["messages"])]
    if row["specialist"] == "calculator_chat":
      assert roles[:2] == ["system", "user"] and "tool" in roles
    else:
      assert roles == ["user", "assistant"]
  # In a process of its own a specialist was the one that it is in this one.
  (tmp_path / "sorting_chat.json").unlink()
  first = (tmp_path / "sorting_chat").rename(tmp_path / "first")
  alone = post_train(tmp_path, "--config.specialist_processes=1")
  assert alone.returncode == 0, alone.stderr
  found = json.loads((tmp_path / "report.json").read_text())
  assert found["pass_at_1"] == report["pass_at_1"]
  rows = [
    (folder / "metrics.jsonl").read_bytes()
    for folder in (first, tmp_path / "sorting_chat")
  ]
  assert rows[0] == rows[1]
  report = found
  # Done is done: nothing is trained again.
  before = (tmp_path / "mixed.json").stat().st_mtime_ns
  again = post_train(tmp_path)
  assert again.returncode == 0, again.stderr
  assert (tmp_path / "mixed.json").stat().st_mtime_ns == before
  assert json.loads((tmp_path / "report.json").read_text()) == report
  # Another recipe does not go on in this folder.
  other = post_train(tmp_path, "--config.start_steps=7")
  assert other.returncode == 1
  assert "start_steps" in other.stderr.splitlines()[-1]
