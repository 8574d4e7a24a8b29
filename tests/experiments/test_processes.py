"""Two real processes train one model: stopped, resumed, one of them killed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from dsv32_jax.training import checkpoint
from dsv32_jax.training import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEARTBEAT = 10
SMALL = (
  "--config.model.num_layers=2",
  "--config.model.num_mtp_layers=0",
  "--config.model.vocab_size=512",
  "--config.data.tokenizer.vocab_size=512",
  "--config.data.tokenizer.sample_bytes=100000",
  "--config.data.sequence_length=64",
  "--config.data.batch_size=4",
)


def start(workdir, *flags):
  environment = dict(
    os.environ,
    # The tests' eight devices are for themselves.
    XLA_FLAGS="--xla_backend_optimization_level=0",
  )
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.train"),
      "--config=configs/tiny.py:sparse",
      *(f"--workdir={workdir}", *SMALL, *flags),
    ],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(workdir, *flags):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    start(
      workdir,
      f"--coordinator=localhost:{port}",
      "--num_processes=2",
      f"--process_id={i}",
      f"--heartbeat_seconds={HEARTBEAT}",
      *flags,
    )
    for i in range(2)
  ]


def finish(*running, seconds=200):
  for process in running:
    _, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors


def wait_for_steps(workdir, count, processes):
  path, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
  while not path.exists() or path.read_bytes().count(b"\n") < count:
    for process in processes:
      assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.fixture
def no_process_is_left():
  """Kills what a failed test leaves behind."""
  started = []
  yield started
  for process in started:
    process.kill()
    # Closes the pipes too, which communicate() does once only.
    with process:
      pass


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_stop_go_on_and_die_together(
  tmp_path, no_process_is_left
):
  two = tmp_path / "two"
  # The second of two is asked to stop: both save one step and leave in order.
  both = start_two(two, "--config.steps=100000")
  no_process_is_left.extend(both)
  wait_for_steps(two, 6, both)
  both[1].send_signal(signal.SIGTERM)
  finish(*both, seconds=60)
  rows = metrics.read_rows(two / "metrics.jsonl")
  steps = [row["step"] for row in rows]
  assert steps == list(range(1, len(rows) + 1)) and len(rows) < 100000
  with checkpoint.Checkpointer(two / "checkpoints", read_only=True) as saved:
    assert saved.latest_step() == steps[-1]

  # They go on; a peer dies without a word, and the survivor does not hang.
  both = start_two(two, "--config.steps=100000")
  no_process_is_left.extend(both)
  wait_for_steps(two, len(rows) + 2, both)
  both[1].kill()
  killed = time.monotonic()
  both[0].communicate(timeout=HEARTBEAT + 30)
  assert both[0].returncode != 0
  assert time.monotonic() - killed < HEARTBEAT + 20
  after = metrics.read_rows(two / "metrics.jsonl")
  assert after[: len(rows)] == rows


@pytest.mark.parametrize(
  "flags",
  [
    ("--num_processes=2",),
    ("--coordinator=localhost:1", "--num_processes=2"),
    ("--coordinator=localhost:1", "--num_processes=2", "--process_id=2"),
  ],
)
def test_flags_that_do_not_fit_are_one_line(flags, tmp_path):
  process = start(tmp_path, *flags)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  assert errors.startswith("error: --") and errors.count("\n") == 1, errors
