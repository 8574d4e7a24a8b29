"""A checkpoint of a random model that writes text, and its server."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.training import model_checkpoint
from tests.support import models


def save_checkpoint(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Writes `checkpoints` and `tokenizer.json`, as a training run has them."""
  tokenizer = tokenizers.train(["hi there, what is it?"] * 5, 300)
  # More ids than the tokenizer has, as in published checkpoints.
  model = models.tiny_model(
    num_layers=2,
    vocab_size=tokenizer.vocab_size + 5,
    max_length=512,
  )
  model_checkpoint.save_model(model, folder / "checkpoints")
  tokenizer.save(folder / "tokenizer.json")
  return tokenizer


def environment(num_devices: int = 1):
  """So many CPU devices, of which the tests themselves have eight."""
  return {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0"
    f" --xla_force_host_platform_device_count={num_devices}",
  }


@contextlib.contextmanager
def server(folder: pathlib.Path, *flags: str):
  """Yields (process, address) of `experiments.serve`, and ends it."""
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.serve", "--port=0"),
      *(f"--checkpoint={folder / 'checkpoints'}", "--dtype=float32"),
      *("--page_size=8", "--prefill_chunk=32", *flags),
    ],
    stdout=subprocess.PIPE,
    text=True,
    env=environment(),
  )
  try:
    line = process.stdout.readline()
    assert "http://" in line, process.wait(60)
    yield process, line.split()[1].rstrip(",").removesuffix("/v1")
  finally:
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
