"""The evaluation program, on every device and over a mesh."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.training import model_checkpoint
from tests.support import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = [f"value_{i} = {i * i}  # line {i}\n" * (3 + i % 5) for i in range(30)]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.evaluate", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint with its tokenizer beside it, and text."""
  folder = tmp_path_factory.mktemp("evaluate")
  tokenizer_lib.train(TEXTS, 280).save(folder / "tokenizer.json")
  model = models.tiny_model(vocab_size=280, num_mtp_layers=0, num_layers=2)
  model_checkpoint.save_model(model, folder / "checkpoints")
  (folder / "text").mkdir()
  for i, text in enumerate(TEXTS):
    (folder / "text" / f"{i:02d}.txt").write_text(text)
  return folder


def flags_for(folder, workdir):
  return (
    "--config=configs/evaluate.py",
    f"--workdir={workdir}",
    "--config.data.sources[0].kind=text",
    f"--config.data.sources[0].path={folder}/text/*.txt",
    "--config.data.sequence_length=64",
    # Not a multiple of eight devices.
    "--config.data.batch_size=12",
    "--config.max_batches=3",
  )


def test_both_ways_give_the_same_numbers(folder, tmp_path):
  checkpoint = f"--checkpoint={folder}/checkpoints"
  found = {}
  for name, extra in {
    "pmap": (),
    "mesh": (
      "--config.spread=mesh",
      "--config.mesh.fsdp=4",
      "--config.mesh.expert=2",
    ),
  }.items():
    workdir = tmp_path / name
    done = run(*flags_for(folder, workdir), checkpoint, *extra)
    assert done.returncode == 0, done.stderr
    found[name] = json.loads((workdir / "evaluation.json").read_text())
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["name"] for row in rows] == ["dense", "top_k"]
  assert found["pmap"]["devices"] == found["mesh"]["devices"] == 8
  for name, want in found["pmap"]["results"].items():
    got = found["mesh"]["results"][name]
    assert got.keys() == want.keys() and want["tokens"] > 1000
    for key in want:
      np.testing.assert_allclose(got[key], want[key], rtol=1e-5, err_msg=key)


def test_a_missing_tokenizer_is_told(folder, tmp_path):
  model_checkpoint.save_model(
    models.tiny_model(num_mtp_layers=0, num_layers=2), tmp_path / "checkpoints"
  )
  done = run(
    *flags_for(folder, tmp_path / "out"),
    f"--checkpoint={tmp_path}/checkpoints",
  )
  assert done.returncode == 1
  assert "tokenizer.json does not exist: set --config.data" in done.stderr
  assert done.stderr.count("\n") == 1


def test_which_checkpoint(folder, tmp_path):
  done = run(*flags_for(folder, tmp_path))
  assert done.returncode == 1
  assert done.stderr == (
    "error: give one of --hf_checkpoint and --checkpoint\n"
  )
