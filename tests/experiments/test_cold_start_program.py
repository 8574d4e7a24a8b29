"""The cold start's program: its files, going on, its mistakes in one line."""

import json
import pathlib
import subprocess
import sys

from dsv32_jax.agents import cold_start

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(workdir, *arguments, variant="reasoning"):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.cold_start",
      f"--config=configs/cold_start.py:{variant}",
      f"--workdir={workdir}",
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_right_answers_become_data_and_a_run_goes_on(tmp_path):
  options = ("--config.num_tasks=4", "--config.attempts=3")
  done = run(tmp_path, *options)
  assert done.returncode == 0, done.stderr
  episodes, kept = (
    rows(tmp_path / name) for name in ("episodes.jsonl", "sft.jsonl")
  )
  left_out = rows(tmp_path / "rejections.jsonl")
  assert len(episodes) == 12 == len(kept) + len(left_out)
  right = {row["task"] for row in episodes if row["reward"] == 1.0}
  assert {row["id"].split("/")[1] for row in kept} == right and len(right) >= 3
  for row in kept:
    assert cold_start.pieces(json.loads(row["messages"]), "thinking") == (
      json.loads(row["pieces"])
    )
  before = (tmp_path / "sft.jsonl").read_bytes()
  path = tmp_path / "episodes.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:5]) + lines[5][:30])
  assert run(tmp_path, *options).returncode == 0
  assert (tmp_path / "sft.jsonl").read_bytes() == before


def test_mistakes_are_one_line(tmp_path):
  for arguments, told in [
    (("--config.attempts=0",), "attempts=0 must be positive"),
    (("--config.modes=('x',)",), "must be of reasoning, tool_use"),
    (("--config.modes=('tool_use',)",), "search_tasks is empty"),
    (("--config.model=m",), "go together"),
    ((f"--config.search_tasks={tmp_path}",), "tasks.jsonl"),
  ]:
    done = run(tmp_path / "w", *arguments)
    assert done.returncode == 1
    assert told in done.stderr and done.stderr.count("\n") == 1, done.stderr
