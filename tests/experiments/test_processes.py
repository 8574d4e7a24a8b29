"""Two real processes train one model: stopped, resumed, one of them killed."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

from flax import nnx
import numpy as np
import pytest

from dsv32_jax.training import checkpoint
from dsv32_jax.training import metrics
from dsv32_jax.training import model_checkpoint
from tests.support import stage_steps
from tests.support import tolerances

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
RTOL, _ = tolerances.TOLERANCE["float32"]
STEPS, EVERY = 24, 6
# All checkpoints stay, for runs that begin at an old one.
WHOLE = (
  f"--config.steps={STEPS}",
  f"--config.checkpoint.every_steps={EVERY}",
  "--config.checkpoint.max_to_keep=100",
  "--config.held_out.batches=1",
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


def wait_until(is_reached, processes, seconds=900):
  deadline = time.monotonic() + seconds
  while not is_reached():
    for process in processes:
      assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.05)


def wait_for_steps(workdir, count, processes):
  path = workdir / "metrics.jsonl"
  wait_until(
    lambda: path.exists() and path.read_bytes().count(b"\n") >= count,
    processes,
  )


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


def manifest(workdir, step):
  path = workdir / "checkpoints" / str(step) / "manifest" / "metadata"
  return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Folder of a run of two processes that nothing interrupted."""
  folder = tmp_path_factory.mktemp("processes") / "whole"
  both = start_two(folder, *WHOLE)
  try:
    finish(*both, seconds=900)
  finally:
    for process in both:
      process.kill()
      with process:
        pass
  return folder


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_whose_peers_are_killed_ends_as_if_none_was(
  whole, tmp_path, no_process_is_left
):
  """First the second process is killed, later the one that coordinates."""
  folder, reached = tmp_path / "killed", 0
  for victim, step in ((1, EVERY), (0, 2 * EVERY)):
    both = start_two(folder, *WHOLE)
    no_process_is_left.extend(both)
    # Orbax renames what is whole to the number of its step.
    wait_until((folder / "checkpoints" / str(step)).exists, both)
    # A row each time for what is held out; then one that is done once more.
    wait_for_steps(folder, step + step // EVERY + 1, both)
    both[victim].kill()
    _, errors = both[1 - victim].communicate(timeout=HEARTBEAT + 30)
    assert both[1 - victim].returncode != 0
    assert "heartbeat" in errors or "coordination" in errors.lower()
    with checkpoint.Checkpointer(folder / "checkpoints", read_only=True) as now:
      assert reached < now.latest_step() < STEPS
      reached = now.latest_step()
  both = start_two(folder, *WHOLE)
  no_process_is_left.extend(both)
  finish(*both, seconds=900)
  names = [x["name"] for x in metrics.read_rows(whole / "metrics.jsonl")]
  assert names.count("train") == STEPS
  assert names.count("held_out") == STEPS // EVERY
  got, want = (x / "metrics.jsonl" for x in (folder, whole))
  assert got.read_bytes() == want.read_bytes()
  # Checksums of all arrays, moments and counters too, and the data positions.
  got, want = manifest(folder, STEPS), manifest(whole, STEPS)
  assert got["trees"] == want["trees"]
  assert len(got["process_notes"]) == 2
  assert got["process_notes"] == want["process_notes"]
  parameters, expected = (
    stage_steps.flat(nnx.state(model_checkpoint.load_model(x / "checkpoints")))
    for x in (folder, whole)
  )
  assert parameters.keys() == expected.keys()
  for path, value in parameters.items():
    np.testing.assert_array_equal(value, expected[path], err_msg=str(path))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_of_two_processes_goes_on_in_one_and_then_in_two(
  whole, tmp_path, no_process_is_left
):
  folder = tmp_path / "other"
  shutil.copytree(whole, folder)
  for step in range(2 * EVERY, STEPS + 1, EVERY):
    shutil.rmtree(folder / "checkpoints" / str(step))
  flags = [flag for flag in WHOLE if flag != f"--config.steps={STEPS}"]
  alone = start(folder, *flags, f"--config.steps={3 * EVERY}")
  no_process_is_left.append(alone)
  finish(alone, seconds=900)
  assert len(manifest(folder, 3 * EVERY)["process_notes"]) == 1
  both = start_two(folder, *flags, f"--config.steps={STEPS}")
  no_process_is_left.extend(both)
  finish(*both, seconds=900)
  # The same data: the position at the end is that of the whole run.
  got, want = manifest(folder, STEPS), manifest(whole, STEPS)
  assert got["process_notes"] == want["process_notes"]
  assert_same_data(folder, whole, STEPS)


def assert_same_data(folder, whole, steps):
  """The same tokens, and losses within rounding."""
  rows, expected = (
    [
      row
      for row in metrics.read_rows(one / "metrics.jsonl")
      if row["step"] <= steps
    ]
    for one in (folder, whole)
  )
  for row, other in zip(rows, expected, strict=True):
    for name in ("step", "name", "tokens"):
      assert row.get(name) == other.get(name)
    np.testing.assert_allclose(row["loss"], other["loss"], rtol=RTOL)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_processes_that_share_rows_read_the_same(
  whole, tmp_path, no_process_is_left
):
  """Each has half of the tokens of all rows, in place of half of the rows."""
  folder = tmp_path / "context"
  both = start_two(
    folder,
    *(flag for flag in WHOLE if flag != f"--config.steps={STEPS}"),
    f"--config.steps={EVERY}",
    "--config.data.streams=2",
    "--config.mesh.data=1",
    "--config.mesh.context=2",
  )
  no_process_is_left.extend(both)
  finish(*both, seconds=900)
  assert_same_data(folder, whole, EVERY)
  one, other = manifest(folder, EVERY)["process_notes"]
  assert one == other and len(json.loads(one)["positions"]) == 2


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
