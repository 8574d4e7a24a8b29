"""The variants that a model writes, over a socket and a server of scripts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsv32_jax.agents import policy as policies
from tests.support import authors
from tests.support import scripted_server

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(variant, workdir, *flags):
  return subprocess.run(
    [
      *(sys.executable, "-m", "experiments.synthesize"),
      f"--config=configs/synthesize.py:{variant}",
      *(f"--workdir={workdir}", *flags),
    ],
    cwd=ROOT,
    env={**os.environ, "OPENAI_API_KEY": "none"},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


def general(messages):
  """Writes an environment, or solves a task."""
  if "Build an environment" in messages[1]["content"]:
    return policies.replies(*authors.whole())(messages)
  return authors.solver(messages)


@pytest.mark.slow
def test_general(tmp_path):
  with scripted_server.serving(general) as url:
    done = run(
      "authored",
      tmp_path,
      f"--config.base_url={url}",
      "--config.model=script",
      "--config.num_tasks=1",
      "--config.concurrency=1",
    )
  assert done.returncode == 0, done.stderr
  assert "1 environments, 1 tasks of 1 candidates" in done.stdout
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["solution_calls"] == [9]
  assert (tmp_path / "tasks.parquet").exists()


def test_without_a_server_it_says_so(tmp_path):
  done = run("authored", tmp_path)
  assert done.returncode == 1
  assert done.stderr.count("\n") == 1
  assert "config.base_url='' and config.model=''" in done.stderr
