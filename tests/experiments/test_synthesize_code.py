"""The synthesis program: code tasks and questions that only code answers."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.support import code_repository as repositories

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(variant, workdir, *arguments):
  config = f"--config=configs/synthesize.py:{variant}"
  return subprocess.run(
    [
      sys.executable,
      *("-m", "experiments.synthesize", config),
      f"--workdir={workdir}",
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=250,
  )


def report_of(workdir):
  return json.loads((workdir / "report.json").read_text())


@repositories.needs_node
@pytest.mark.slow
def test_code_tasks_of_two_languages(tmp_path):
  clone, workdir = tmp_path / "words", tmp_path / "run"
  clone.mkdir()
  for files, path, tests, fix in (
    (*repositories.SOURCES["python"], repositories.FIX["python"]),
    (*repositories.SOURCES["javascript"], repositories.FIX["javascript"]),
  ):
    repositories.commit(clone, files, "Words are counted somehow, to begin")
    change = {path: tests, fix[0]: fix[1]}
    repositories.commit(clone, change, "Blanks between words are no words")
  done = run("code", workdir, f"--config.repository={clone}")
  assert done.returncode == 0, done.stderr
  # The first commit of JavaScript mends nothing, but brings what is tested.
  assert "3 tasks of 3 candidates" in done.stdout
  report = report_of(workdir)
  assert report["languages"] == {"python": 1, "javascript": 2}
  assert report["rejections"] == {}
  counts = report["counts"]
  assert (counts["fail_to_pass"], counts["pass_to_fail"]) == (2 + 1 + 2, 0)
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  assert json.loads(rows[0])["name"] == "synthesis"


@pytest.mark.slow
def test_questions_that_only_code_answers(tmp_path):
  small = "--config.num_tasks=17"
  done = run("interpreter_small", tmp_path, small)
  assert done.returncode == 0, done.stderr
  report = report_of(tmp_path)
  assert report["tasks"] == 17 and len(report["kinds"]) >= 15
  assert report["trajectories_rewarded"] == report["trajectories"] == 4
  assert report["baselines"]["answer_of_another"] == 0
  before = (tmp_path / "tasks.parquet").read_bytes()
  assert run("interpreter_small", tmp_path, small).returncode == 0
  assert (tmp_path / "tasks.parquet").read_bytes() == before


@pytest.mark.parametrize(
  ("variant", "argument", "told"),
  [
    (
      "code",
      "--config.repository=nowhere",
      "repository='nowhere' is no folder",
    ),
    ("code", "--config.workers=0", "workers=0 must be at least 1"),
    ("interpreter", "--config.num_tasks=0", "num_tasks=0 must be at least 1"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, variant, argument, told):
  done = run(variant, tmp_path, argument)
  assert done.returncode == 1
  assert told in done.stderr and done.stderr.count("\n") == 1
