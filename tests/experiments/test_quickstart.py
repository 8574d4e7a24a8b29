"""The quickstart writes what its contract says, and goes on where it stood."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.support import notebook_runs

ROOT = pathlib.Path(__file__).resolve().parents[2]


def quickstart(*arguments):
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.run(
    [sys.executable, "-m", "experiments.quickstart", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_and_the_notebook_goes_on(tmp_path):
  folder = tmp_path / "runs" / "quickstart" / "smoke"
  first = quickstart("--smoke", f"--workdir={folder}")
  assert first.returncode == 0, first.stderr
  report = json.loads((folder / "report.json").read_text())
  assert report["held_out_loss"].keys() == {"dense", "dsa", "random", "window"}
  assert {"dsa", "best"} <= report["attention_mass"].keys()
  assert 0 < report["attention_mass"]["dsa"] <= report["attention_mass"]["best"]
  assert report["sequence_length"] >= 8 * report["top_k"]
  assert report["tokens"] > 1000 and report["seconds"] > 0
  text = (folder / "report.md").read_text()
  for name in ("loss", "indexer", "held_out", "position", "mass", "decode"):
    assert f"({name}.png)" in text
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert "control: random keys" in first.stderr

  again = quickstart("--smoke", f"--workdir={folder}")
  assert again.returncode == 0, again.stderr
  assert json.loads((folder / "report.json").read_text()) == report
  other = quickstart(
    "--config=configs/quickstart.py:smoke",
    "--config.seed=1",
    f"--workdir={folder}",
  )
  assert other.returncode == 1
  assert "holds a recipe with another config.seed" in other.stderr

  # The same calls cell by cell, where all is there but the report.
  (folder / "report.json").unlink()
  notebook_runs.execute(notebook_runs.FOLDER / "quickstart.ipynb", tmp_path)
  found = json.loads((folder / "report.json").read_text())
  assert found["held_out_loss"] == report["held_out_loss"]


def test_smoke_is_not_changed_in_silence(tmp_path):
  done = quickstart("--smoke", "--config.seed=1", f"--workdir={tmp_path}")
  assert done.returncode == 1
  assert done.stderr.startswith("error: --smoke is --config=")
  assert done.stderr.count("\n") == 1


def test_a_wrong_field_is_named(tmp_path):
  done = quickstart("--config.measure.length=100", f"--workdir={tmp_path}")
  assert done.returncode == 1
  assert "measure.length=100 is below 8 * model.index_top_k" in done.stderr
