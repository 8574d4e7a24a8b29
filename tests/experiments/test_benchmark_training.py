"""The training benchmark at a tiny size, and its bookkeeping."""

import json
import os

from absl.testing import flagsaver
import pytest

from experiments import benchmark_training
from experiments import benchmark_training_plots
from experiments import benchmark_training_rows as rows_lib
from experiments import common
from experiments import stopwatch


def results(lengths=(256, 512)):
  """Made-up rows: DSA takes 2 s whatever the length, dense 1 s at 256."""
  for row in rows_lib.rows(lengths, "tiny", "layer", 2, 8192):
    if row["job"] == "input":
      yield row | {"tokens": 10_000, "seconds": 2.0}
      continue
    seconds = 2.0 if row["variant"] == "dsa" else row["length"] / 256
    yield row | {
      "seconds": seconds,
      "cpu_seconds": 2 * seconds,
      "temporary_bytes": 1000 * row["length"],
      "parts": {"attention": 3.0, "experts": 1.0},
    }


def test_rows_are_not_repeated():
  rows = list(rows_lib.rows([1, 2], "tiny", "layer", 2, 2))
  assert len(set(map(json.dumps, rows))) == len(rows) == 5
  assert [row["single"] for row in rows if row["job"] == "step"] == [
    *(False, False),
    *(True, True),
  ]


def test_a_run_without_a_warm_up_is_timed_once():
  calls = []
  found = stopwatch.measure(lambda: calls.append(1), runs=1, warm_up=False)
  assert len(calls) == len(found["runs"]) == 1
  assert "first_seconds" not in found
  found = stopwatch.measure(lambda: calls.append(1), runs=1)
  assert len(calls) == 3 and found["first_seconds"] > 0


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (["0x1"], "--lengths=0x1 must be positive integers"),
    ([], "--lengths= must be"),
    (["8192"], "--lengths=8192 exceeds tiny's 4096"),
  ],
)
def test_bad_lengths(values, message):
  with pytest.raises(ValueError, match=message):
    rows_lib.check_lengths(values, "tiny")


def test_plots_and_tables(tmp_path, capsys):
  path = tmp_path / "training.jsonl"
  old = next(row for row in results() if row["job"] == "step")
  rows = [old | {"seconds": 1e9}, *results()]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  benchmark_training_plots.write(path, tmp_path)
  for name in ("speed", "time", "memory", "parts"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  # 5000 tokens a second beside 256 of the faster step.
  assert "input: 19.5 times as fast as" in capsys.readouterr().out
  found = benchmark_training_plots.load(path)
  assert len(found) == 5
  table = benchmark_training_plots.parts_table(found, 512)
  assert "| attention | 75.0% | 75.0% |" in table.splitlines()
  with pytest.raises(ValueError, match="--parts_of=7 has not been profiled"):
    benchmark_training_plots.parts_table(found, 7)


def test_what_nobody_profiled_has_no_parts(tmp_path):
  path = tmp_path / "training.jsonl"
  bare = [{k: row[k] for k in row if k != "parts"} for row in results()]
  path.write_text("".join(json.dumps(row) + "\n" for row in bare))
  benchmark_training_plots.write(path, tmp_path)
  assert (tmp_path / "speed.png").exists()
  assert not (tmp_path / "parts.png").exists()
  with pytest.raises(ValueError, match="--parts_of=512 has not been profiled"):
    benchmark_training_plots.parts_table(
      benchmark_training_plots.load(path), 512
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_tiny_step_is_measured(tmp_path):
  common.parse_flags([])
  # Its own CPUs, so that the tests after it keep theirs.
  threads = len(os.sched_getaffinity(0))
  with flagsaver.flagsaver(
    workdir=str(tmp_path),
    model="tiny",
    lengths=["128"],
    threads=threads,
  ):
    benchmark_training.main([])
  rows = [
    json.loads(line)
    for line in (tmp_path / "training.jsonl").read_text().splitlines()
  ]
  steps = {row["variant"]: row for row in rows if row["job"] == "step"}
  assert set(steps) == {"dsa", "dense"}
  for row in steps.values():
    assert row["seconds"] > 0 and row["temporary_bytes"] > 0
    # Parameters of the preset and two moments, float32.
    assert 3e7 < row["state_bytes"] < 1e8
    assert row["peak_rss_bytes"] > row["state_bytes"]
  assert steps["dsa"]["parts"]["indexer KL"] > 0
  assert "indexer KL" not in steps["dense"]["parts"]
  # The input keeps ahead of the step.
  (read,) = (row for row in rows if row["job"] == "input")
  fastest = max(row["length"] / row["seconds"] for row in steps.values())
  assert read["tokens"] / read["seconds"] > fastest
  assert (tmp_path / "speed.png").exists()
