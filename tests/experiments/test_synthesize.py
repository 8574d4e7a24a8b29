"""The synthesis program: its files, its report, its mistakes in one line."""

import json
import pathlib
import subprocess
import sys

from matplotlib import image
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = "--config=configs/synthesize.py:small"


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.synthesize", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("synthesize")
  done = run(SMALL, f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  assert "26 environments, 63 tasks" in done.stdout
  return workdir


def test_the_report(workdir):
  report = json.loads((workdir / "report.json").read_text())
  lines = (workdir / "environments.jsonl").read_text().splitlines()
  assert len(lines) == report["environments"] == report["distinct_data"] == 26
  assert report["tasks"] == 63 and len(report["domains"]) == 13
  assert report["baselines"]["random"] < 0.05
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["name"] for row in rows] == [
    "synthesis",
    "baseline_random",
    "baseline_planner",
    "baseline_one_list",
    "baseline_one_call",
  ]


def test_the_histogram_shows_something(workdir):
  pixels = image.imread(workdir / "solution_lengths.png")
  assert pixels.shape[0] > 300 and pixels.shape[1] > 600
  assert len({tuple(row) for row in pixels[::7, ::7].reshape(-1, 4)}) > 6


def test_running_again_changes_nothing(workdir):
  names = ("environments.jsonl", "tasks.parquet", "rejections.jsonl")
  before = [(workdir / name).read_bytes() for name in names]
  assert run(SMALL, f"--workdir={workdir}").returncode == 0
  assert [(workdir / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
  ("argument", "told"),
  [
    ("--config.seed=1", "was made with seed=0, not 1"),
    ("--config.workers=0", "workers=0 must be at least 1"),
    ("--config.num_tasks=2", "num_tasks=2 must be 26 to 130"),
  ],
)
def test_a_mistake_is_one_line(workdir, argument, told):
  done = run(SMALL, f"--workdir={workdir}", argument)
  assert done.returncode == 1
  assert told in done.stderr and done.stderr.count("\n") == 1
