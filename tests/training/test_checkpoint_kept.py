"""Which checkpoints stay, which is the best, what they say of themselves."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import dsv32_jax
from dsv32_jax.training import checkpoint
from dsv32_jax.training import manifest
from dsv32_jax.training import processes
import pallas_kernels


def save(folder, losses, first=1, **config):
  """Saves a step for each loss."""
  config = checkpoint.CheckpointConfig(**config)
  with checkpoint.Checkpointer(folder, config) as checkpointer:
    for step, loss in enumerate(losses, first):
      values = {"a": jnp.full(3, step, jnp.float32)}
      checkpointer.save(step, {"params": values}, loss=loss)


def kept(folder):
  with checkpoint.Checkpointer(folder, read_only=True) as reader:
    return reader.steps(), reader.best_step()


def test_the_best_stay_beside_the_newest(tmp_path):
  save(tmp_path, [5.0, 2.0, 3.0, 4.0, 4.5], max_to_keep=2, keep_best=1)
  assert kept(tmp_path) == ([2, 4, 5], 2)
  # A run that goes on knows the losses of its former life.
  save(tmp_path, [4.0, 1.0, 6.0, 7.0], 6, max_to_keep=2, keep_best=1)
  assert kept(tmp_path) == ([7, 8, 9], 7)


def test_what_is_no_number_is_never_the_best(tmp_path):
  save(tmp_path, [3.0, float("nan"), None, float("-inf")], keep_best=1)
  assert kept(tmp_path)[1] == 1
  save(tmp_path, [3.0], 5, keep_best=1)
  # Of equal ones the newest.
  assert kept(tmp_path)[1] == 5


def test_without_losses_there_is_no_best(tmp_path):
  save(tmp_path, [None, None])
  with pytest.raises(
    FileNotFoundError, match=r"no checkpoint in .* has a loss"
  ):
    kept(tmp_path)
  with pytest.raises(ValueError, match=r"checkpoint\.keep_best=-1"):
    checkpoint.CheckpointConfig(keep_best=-1)


def test_a_damaged_checkpoint_is_not_the_best(tmp_path):
  save(tmp_path, [1.0, 2.0, 3.0])
  path = tmp_path / "1" / "manifest" / "metadata"
  path.write_text(path.read_text().replace("1.0", "0.5"))
  assert kept(tmp_path)[1] == 2


def test_notes_of_other_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "gather", lambda value: [value, "other"])
  values = {"params": {"a": jnp.ones(3)}}
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, values, process_notes={"position": 7})
  monkeypatch.undo()
  with checkpoint.Checkpointer(tmp_path, read_only=True) as reader:
    found = reader.restore(values)
  assert found.process_notes == [{"position": 7}, "other"]
  assert found.trees["params"]["a"].tolist() == [1.0, 1.0, 1.0]


def test_the_manifest_tells_the_code(tmp_path):
  save(tmp_path, [1.0])
  path = tmp_path / "1" / "manifest" / "metadata"
  told = json.loads(path.read_text())["code"]
  assert told["jax"] == jax.__version__
  # Counted again, from the files.
  root = pathlib.Path(dsv32_jax.__file__).parents[1]
  assert pathlib.Path(pallas_kernels.__file__).parents[1] == root
  lines = ""
  for package in ("dsv32_jax", "pallas_kernels"):
    for file in sorted((root / package).rglob("*.py")):
      digest = hashlib.sha256(file.read_bytes()).hexdigest()
      lines += f"{file.relative_to(root).as_posix()} {digest}\n"
  assert told["sources"] == hashlib.sha256(lines.encode()).hexdigest()


def test_a_seal_is_broken_by_any_change():
  made = manifest.make({"params": {}}, {"rate": 0.1}, [None], 2.0)
  content = manifest.unseal(made)
  assert content["notes"] == {"rate": 0.1} and content["loss"] == 2.0
  with pytest.raises(ValueError, match="does not match its digest"):
    manifest.unseal(made | {"loss": 1.0})
  for foreign in (content, [], None):
    with pytest.raises(ValueError, match="has no digest"):
      manifest.unseal(foreign)
