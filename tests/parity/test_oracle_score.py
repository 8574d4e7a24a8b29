"""`experiments.score` against recorded runs of the official computation."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.parity import comparison
from tests.parity import conftest

pytestmark = pytest.mark.parity

# Set by those who recorded the arrays, relative to the largest entry.
TOLERANCE = 1e-4
FP8_INDEX_TOLERANCE = 1e-3


def read(folder, run):
  with np.load(folder / f"{run}.npz") as arrays:
    return dict(arrays)


def score(checkpoint, token_ids, workdir, *flags):
  """Runs the program and returns the arrays that it writes."""
  token_path, output = workdir / "token_ids.npy", workdir / "output.npz"
  np.save(token_path, token_ids)
  # One device, as a user would have it.
  environment = {
    name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
  }
  done = subprocess.run(
    [
      sys.executable,
      *("-m", "experiments.score", f"--hf_checkpoint={checkpoint}"),
      *(f"--token_ids={token_path}", f"--output={output}", *flags),
    ],
    cwd=conftest.REPOSITORY,
    env=environment,
    check=False,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  with np.load(output) as arrays:
    return dict(arrays)


@pytest.mark.parametrize(
  ("run", "checkpoint", "num_arrays"),
  [
    ("A_fp32_sparse", "tiny_bf16", 20),
    ("A_fp32_dense_short", "tiny_bf16", 20),
    ("B_fp8w_dequant_fp32", "tiny_fp8", 20),
  ],
)
def test_prefill_and_decode(
  oracle_folder, tmp_path, run, checkpoint, num_arrays
):
  want = read(oracle_folder, run)
  assert len(want) == num_arrays
  prefill_length = int(want["decode_prefill_len"])
  got = score(
    oracle_folder / checkpoint,
    want["input_ids"],
    tmp_path,
    "--capture",
    f"--prefill_length={prefill_length}",
  )
  assert set(want) <= set(got)
  for name, value in want.items():
    comparison.assert_matches(name, got[name], value, TOLERANCE)


def test_multi_token_prediction(oracle_folder, tmp_path):
  want = read(oracle_folder, "A_fp32_mtp")
  token_ids = read(oracle_folder, "A_fp32_sparse")["input_ids"]
  got = score(oracle_folder / "tiny_bf16", token_ids, tmp_path, "--mtp")
  assert want
  for name, value in want.items():
    comparison.assert_matches(name, got[name], value, TOLERANCE)


def test_fp8_indexer(oracle_folder, tmp_path):
  want = read(oracle_folder, "B_fp8index_fp32")
  got = score(
    oracle_folder / "tiny_fp8",
    want["input_ids"],
    tmp_path,
    "--capture",
    "--indexer_precision=fp8",
  )
  # Later layers have ties between exact zeros; only the first is comparable.
  for name in ("index_scores", "topk_mask"):
    comparison.assert_matches(
      name, got[name][0], want[name][0], FP8_INDEX_TOLERANCE
    )
