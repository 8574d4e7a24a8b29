"""experiments.kernels: lines it prints, exit codes, its table."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import kernels_table
from pallas_kernels import timing

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.kernels", *arguments],
    check=False,
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  lines = done.stdout.splitlines()
  return done.returncode, [json.loads(line) for line in lines], done.stderr


def test_checks_and_times_and_writes_the_table(tmp_path):
  code, found, errors = run(
    "--mode=bench",
    "--platform=cpu",
    "--shapes=small",
    "--op=sparse_mla",
    "--case=causal,prefill",
    "--implementations=xla",
    "--seconds=0.01",
    "--seeds=1",
    f"--workdir={tmp_path}",
  )
  assert code == 0, errors
  checks = [row for row in found if row["mode"] == "check"]
  assert {row["dtype"] for row in checks} == {"float32", "bfloat16"}
  assert all(row["passed"] and row["error"] <= row["bound"] for row in checks)
  timed = [row for row in found if row["mode"] == "bench"]
  assert [row["direction"] for row in timed] == ["forward", "forward_backward"]
  for row in timed:
    assert 0 < row["min_seconds"] <= row["seconds"]
    assert 0 < row["floor_seconds"] < row["seconds"]
    assert row["ratio"] == 1.0
  readme = tmp_path / "README.md"
  markers = f"{kernels_table.BEGIN}\nold\n{kernels_table.END}"
  readme.write_text(f"before\n{markers}\nafter\n")
  kernels_table.write(tmp_path / "kernels.jsonl", readme)
  text = readme.read_text()
  assert text.startswith(f"before\n{kernels_table.BEGIN}\n| cpu |")
  assert f"![Roofline of the kernels]({kernels_table.PLOT})" in text
  assert "2 of 2 checks" in text
  assert "old" not in text
  assert (tmp_path / kernels_table.PLOT).stat().st_size > 1000


MISTAKES = (
  (["--mode=nonsense"], "--mode=nonsense"),
  (["--implementations=nonsense"], "nonsense"),
  (
    ["--mode=schedule", "--platform=gpu:h200", "--op=expert_ffn"],
    "no operation has kernels for 'gpu'",
  ),
)
MORE_MISTAKES = (
  (["--op=nonsense"], "nonsense"),
  (["--case=nonsense"], "nonsense"),
  (["--platform=nonsense"], "nonsense"),
  (["--mode=schedule", "--platform=cpu"], "names no device"),
  (["--readme=README.md"], "--workdir"),
  (["--op="], "--op names no operation"),
  (["--seeds=0"], "--seeds"),
  (["--implementations=xla,nonsense"], "nonsense"),
  (
    ["--mode=schedule", "--platform=tpu:v5p:2x2x1", "--budget=nonsense"],
    "nonsense",
  ),
  (
    ["--mode=schedule", "--platform=tpu:v5p:2x2x1", "--write_budget"],
    "--write_budget needs --budget",
  ),
)


@pytest.mark.parametrize(
  "arguments, words",
  [
    *MISTAKES,
    *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_MISTAKES),
  ],
)
def test_a_mistake_takes_one_line(arguments, words):
  code, found, errors = run(*arguments)
  assert (code, found) == (1, [])
  lines = [line for line in errors.splitlines() if line]
  assert lines[-1].startswith("error: "), errors
  assert words in lines[-1]
  assert not any("Traceback" in line for line in lines)


def timing_row(**changes):
  row = {
    "mode": "bench",
    "device": "NVIDIA H200",
    "operation": "sparse_mla",
    "case": "prefill",
    "sizes": {"queries": 8},
    "dtype": "bfloat16",
    "direction": "forward",
    "implementation": "xla",
    "seconds": 0.002,
    "flops": 10**12,
    "bytes": 10**9,
    "floor_seconds": 0.001,
    "share_of_floor": 0.5,
    "ratio": 1.0,
  }
  return row | changes


def test_the_table_holds_the_last_timing_of_each_kind():
  check = {
    "mode": "check",
    "platform": "gpu",
    "dtype": "bfloat16",
    "error": 0.003,
    "passed": True,
  }
  rows = [
    timing_row(seconds=9.0),
    timing_row(),
    timing_row(implementation="gpu", seconds=0.001, ratio=2.0),
    timing_row(device="TPU v5p", implementation="tpu") | {"skipped": "too odd"},
    check,
    check | {"error": 0.5, "passed": False},
  ]
  text = kernels_table.table(rows)
  assert "| xla | 2.000 | 1.000 | 50% | 1.00x |" in text
  assert "| gpu | 1.000 | 1.000 | 50% | 2.00x |" in text
  assert "| tpu | skipped: too odd |" in text
  assert "9000" not in text
  assert "1 of 2 checks" in text
  assert "gpu bfloat16 5.0e-01" in text
  with pytest.raises(ValueError, match="no timing"):
    kernels_table.table([check])


def test_the_plot_has_a_panel_a_device(tmp_path):
  rows = [timing_row(), timing_row(device="cpu", implementation="other")]
  path = tmp_path / "plot.png"
  kernels_table.plot(rows, path)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_a_file_without_markers_is_refused(tmp_path):
  results, readme = tmp_path / "kernels.jsonl", tmp_path / "README.md"
  results.write_text(json.dumps(timing_row()) + "\n")
  readme.write_text("no markers")
  with pytest.raises(ValueError, match="needs one"):
    kernels_table.write(results, readme)


def test_timing_waits_for_each_call():
  calls = []

  def function(x):
    calls.append(x)
    return x

  inputs = [jnp.zeros(3), jnp.ones(3)]
  taken = timing.time_calls(function, inputs, budget=0.0)
  assert 0 < taken.least <= taken.median < 1
  assert len(calls) >= 2 * len(inputs)
  peaks = timing.peaks(jax.devices("cpu")[0])
  assert 1e8 < peaks.flops["float32"] < 1e15
  assert peaks.bytes is None
