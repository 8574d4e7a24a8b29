"""The whole of post-training, run small as its users run it."""

import dataclasses
import json

import pytest

from configs import post_training as configs
from tests.support import programs


def post_train(workdir, *arguments):
  return programs.run(
    "post_train", "post_training.py:smoke", workdir, *arguments, timeout=290
  )


@pytest.mark.slow
def test_every_model_is_reported_in_every_domain(tmp_path):
  finished = post_train(tmp_path)
  assert finished.returncode == 0, finished.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  domains = {"all", "sorting", "arithmetic"}
  models = ["start", "sorting", "arithmetic", "distilled", "mixed"]
  assert list(report["pass_at_1"]) == models
  assert all(set(found) == domains for found in report["pass_at_1"].values())
  for counts in report["distilled"].values():
    assert 0 < counts["mixed"] <= counts["accepted"] <= counts["answers"] == 48
  assert (tmp_path / "pass_at_1.png").read_bytes().startswith(b"\x89PNG")
  # Only accepted answers are learnt from, and what is learnt is the answer.
  rows = (tmp_path / "distillation" / "sft.jsonl").read_text().splitlines()
  for row in map(json.loads, rows):
    question, answer = json.loads(row["messages"])
    assert (question["role"], answer["role"]) == ("user", "assistant")
    assert answer["content"].startswith("\\boxed{")
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


def test_domains_must_differ():
  config = configs.smoke()
  rl = dataclasses.replace(config.rl, tasks=config.rl.tasks[:1] * 2)
  with pytest.raises(ValueError, match="each is a domain"):
    dataclasses.replace(config, rl=rl)
  rl = dataclasses.replace(config.rl, evaluation=None)
  with pytest.raises(ValueError, match=r"rl\.evaluation must be set"):
    dataclasses.replace(config, rl=rl)
