"""The training program: its mistakes in one line, its orderly stop."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dsv32_jax.training import checkpoint
from dsv32_jax.training import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
  "--config.model.num_layers=2",
  "--config.model.num_mtp_layers=0",
  "--config.model.vocab_size=512",
  "--config.data.tokenizer.vocab_size=512",
  "--config.data.tokenizer.sample_bytes=100000",
  "--config.data.sequence_length=64",
  "--config.data.batch_size=2",
)


def command(workdir, *flags):
  return [
    *(sys.executable, "-m", "experiments.train"),
    *("--config=configs/tiny.py:pretrain", f"--workdir={workdir}", *flags),
  ]


def environment():
  """The tests' own, with one device instead of eight."""
  return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.model.num_experts=7", "num_experts=7"),
    ("--config.stage.lm_wieght=1", "lm_wieght"),
    ("--config.steps=0", "steps=0"),
  ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, flag, message):
  done = subprocess.run(
    command(tmp_path / "run", flag),
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1
  assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tmp_path):
  workdir = tmp_path / "run"
  process = subprocess.Popen(
    command(workdir, *SMALL, "--config.steps=100000"),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  rows, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
  while not (rows.exists() and rows.stat().st_size > 1000):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  last = metrics.read_rows(rows)[-1]["step"]
  assert f"stopped at step {last} of 100000" in output
  with checkpoint.Checkpointer(
    workdir / "checkpoints", read_only=True
  ) as checkpoints:
    assert checkpoints.latest_step() == last
