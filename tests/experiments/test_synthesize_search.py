"""The synthesis program on search tasks: its files, a run that is killed."""

import json
import pathlib
import signal
import subprocess
import sys
import time

from pyarrow import parquet
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMAND = [
  sys.executable,
  "-m",
  "experiments.synthesize",
  "--config=configs/synthesize.py:search_small",
  "--config.num_tasks=5",
]


def run(workdir, *arguments):
  return subprocess.run(
    [*COMMAND, f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=240,
  )


def kill_after_rows(workdir, number):
  """Starts a run and kills it once it has written a few candidates."""
  path = workdir / "candidates.jsonl"
  with subprocess.Popen(
    [*COMMAND, f"--workdir={workdir}"],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as process:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
      if path.exists() and path.read_bytes().count(b"\n") >= number:
        break
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
  return path.read_bytes().count(b"\n")


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  done = run(whole)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("5 tasks of ")
  killed.mkdir()
  before = kill_after_rows(killed, 3)
  rows = (whole / "candidates.jsonl").read_bytes().count(b"\n")
  assert 3 <= before < rows
  assert run(killed).returncode == 0
  for name in ("candidates", "helpful", "tasks", "rejections", "trajectories"):
    one, other = (x / f"{name}.jsonl" for x in (whole, killed))
    assert one.read_bytes() == other.read_bytes(), name
  report = json.loads((whole / "report.json").read_text())
  table = parquet.read_table(whole / "tasks.parquet")
  assert table.num_rows == report["tasks"] + report["helpful_kept"]
  assert report["tasks"] == 5 and report["candidates"] == rows


def test_mistakes_are_one_line(tmp_path):
  for argument, told in [
    ("--config.family=none", "config.family='none' is none of authored"),
    ("--config.num_tasks=0", "num_tasks=0 must be at least 1"),
  ]:
    done = run(tmp_path, argument)
    assert done.returncode == 1
    assert told in done.stderr and done.stderr.count("\n") == 1
