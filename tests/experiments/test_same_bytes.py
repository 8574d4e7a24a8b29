"""The same command twice: the same bytes, whatever the clock says."""

import json
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax.training import metrics
from dsv32_jax.training import model_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 8
COMMAND = (
  *(sys.executable, "-m", "experiments.train"),
  "--config=configs/tiny.py:sparse",
  f"--config.steps={STEPS}",
  "--config.model.num_layers=2",
  "--config.model.vocab_size=512",
  "--config.data.tokenizer.vocab_size=512",
  "--config.data.tokenizer.sample_bytes=100000",
  "--config.data.sequence_length=128",
  "--config.data.batch_size=4",
)


def train(workdir):
  environment = dict(
    os.environ,
    # All threads. Compiled anew: what another run left does not help.
    XLA_FLAGS="--xla_backend_optimization_level=0",
    JAX_ENABLE_COMPILATION_CACHE="false",
  )
  done = subprocess.run(
    [*COMMAND, f"--workdir={workdir}"],
    cwd=ROOT,
    env=environment,
    check=False,
    capture_output=True,
    text=True,
    timeout=700,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_runs_write_the_same_bytes(tmp_path):
  runs = tmp_path / "one", tmp_path / "two"
  for workdir in runs:
    train(workdir)
  for name in ("metrics.jsonl", "config.json", "tokenizer.json"):
    one, two = ((workdir / name).read_bytes() for workdir in runs)
    assert one == two and one, name
  rows = metrics.read_rows(runs[0] / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert len({row["loss"] for row in rows}) == STEPS
  # Parameters, moments, counters, data position, code.
  one, two = (
    json.loads(
      (
        workdir / "checkpoints" / str(STEPS) / "manifest" / "metadata"
      ).read_text()
    )
    for workdir in runs
  )
  assert one["trees"] and one == two
  one, two = (
    jax.tree.leaves(
      nnx.state(model_checkpoint.load_model(workdir / "checkpoints"))
    )
    for workdir in runs
  )
  for a, b in zip(one, two, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  # The clock has a file of its own, and no two runs take the same time.
  one, two = ((workdir / "timings.jsonl").read_bytes() for workdir in runs)
  assert one != two
