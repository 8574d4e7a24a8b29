"""Checkpoint folders: which files are read, which refused, what is left."""

import json

import numpy as np
import pytest

from dsv32_jax.weights import folder
from dsv32_jax.weights import safetensors

SPECS = {
  name: safetensors.Spec(dtype="F32", shape=(3, 4)) for name in ("a", "b", "c")
}


def make(path, max_shard_bytes=60):
  path.mkdir(exist_ok=True)
  writer = folder.Writer(str(path), SPECS, max_shard_bytes)
  for number, name in enumerate(SPECS):
    writer.write(name, np.full((3, 4), number, np.float32))
  writer.finish()
  return path


def edit_index(path, change):
  index = path / folder.INDEX
  content = json.loads(index.read_text())
  change(content["weight_map"])
  index.write_text(json.dumps(content))


def test_sharded_and_single(tmp_path):
  sharded = make(tmp_path / "sharded")
  single = make(tmp_path / "single", None)
  assert sorted(p.name for p in sharded.iterdir()) == [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    folder.INDEX,
  ]
  assert [p.name for p in single.iterdir()] == ["model.safetensors"]
  for path in (sharded, single):
    found = folder.open_tensors(path)
    assert list(found) == list(SPECS)
    assert found["c"].read()[0, 0] == 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda m: m.update(a="../sharded/model-00001-of-00003.safetensors"),
      "not a plain file name",
    ),
    (lambda m: m.update(a="/etc/x.safetensors"), "not a plain file name"),
    (lambda m: m.update(a="sub/x.safetensors"), "not a plain file name"),
    (lambda m: m.update(a="sub\\x.safetensors"), "not a plain file name"),
    (lambda m: m.update(a="x.safetensors"), "does not exist"),
    (
      lambda m: m.update(a="model.bin"),
      "'a': 'model.bin' is not",
    ),
    (lambda m: m.update(a=7), "'a': 7 is not a safetensors"),
    (lambda m: m.update(z=m.pop("a")), "'a' is not in this file"),
    (
      lambda m: m.update(d="model-00001-of-00003.safetensors"),
      "00001-of-00003.safetensors: tensor 'd' is missing",
    ),
    (
      lambda m: m.update(a="model-00002-of-00003.safetensors"),
      "tensor 'a'",
    ),
    (lambda m: m.clear(), "weight_map is missing or empty"),
  ],
)
def test_bad_index(tmp_path, change, message):
  path = make(tmp_path / "sharded")
  (path / "model-00004-of-00003.safetensors").write_bytes(b"")
  edit_index(path, change)
  with pytest.raises(ValueError, match=message):
    folder.open_tensors(path)


def test_duplicate_key_in_index(tmp_path):
  path = make(tmp_path / "sharded")
  index = path / folder.INDEX
  index.write_text(index.read_text().replace('"b":', '"a":'))
  with pytest.raises(ValueError, match=r"index.json: bad JSON: duplicate key"):
    folder.open_tensors(path)


def test_link_out_of_the_folder(tmp_path):
  path = make(tmp_path / "sharded")
  file = path / "model-00002-of-00003.safetensors"
  outside = tmp_path / "outside.safetensors"
  file.rename(outside)
  file.symlink_to(outside)
  with pytest.raises(ValueError, match="leads out of the folder"):
    folder.open_tensors(path)
  single = tmp_path / "single"
  single.mkdir()
  (single / "model.safetensors").symlink_to(outside)
  with pytest.raises(ValueError, match="leads out of the folder"):
    folder.open_tensors(single)


def test_links_of_the_hugging_face_cache(tmp_path):
  blobs = tmp_path / "models--a--b" / "blobs"
  snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for number, file in enumerate(sorted(make(tmp_path / "s").iterdir())):
    file.rename(blobs / str(number))
    (snapshot / file.name).symlink_to(f"../../blobs/{number}")
  assert list(folder.open_tensors(snapshot)) == list(SPECS)
  link = snapshot / "model-00001-of-00003.safetensors"
  link.unlink()
  link.symlink_to("../../../secret.safetensors")
  (tmp_path / "secret.safetensors").write_bytes(b"")
  with pytest.raises(ValueError, match="leads out of the folder"):
    folder.open_tensors(snapshot)


@pytest.mark.parametrize("name", ["model.bin", "w.pt", "w.npy", "w.pkl"])
def test_pickles_are_refused(tmp_path, name):
  (tmp_path / name).write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match=f"'{name}' may run code"):
    folder.open_tensors(tmp_path)


def test_no_weights(tmp_path):
  with pytest.raises(ValueError, match="no safetensors file"):
    folder.open_tensors(tmp_path)
  with pytest.raises(ValueError, match="no such folder"):
    folder.open_tensors(tmp_path / "none")
  for name in ("a", "b"):
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
  with pytest.raises(ValueError, match="2 safetensors files and no model"):
    folder.open_tensors(tmp_path)


def test_config(tmp_path):
  with pytest.raises(ValueError, match=r"'config.json' does not exist"):
    folder.read_config(tmp_path)
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"config.json: a JSON object"):
    folder.read_config(tmp_path)
  (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
  with pytest.raises(ValueError, match=r"config.json: .* duplicate key 'a'"):
    folder.read_config(tmp_path)


def test_staged_appears_complete_or_not_at_all(tmp_path):
  target = tmp_path / "deep" / "target"
  with (
    pytest.raises(RuntimeError, match="stop"),
    folder.Staged(str(target)) as staged,
  ):
    folder.write_json(staged.path + "/x.json", {"x": 1})
    raise RuntimeError("stop")
  assert list((tmp_path / "deep").iterdir()) == []
  target.mkdir()
  with folder.Staged(str(target)) as staged:
    folder.write_json(staged.path + "/x.json", {"x": 1})
    assert list(target.iterdir()) == []
  assert [p.name for p in target.iterdir()] == ["x.json"]
  assert [p.name for p in (tmp_path / "deep").iterdir()] == ["target"]
  plain = tmp_path / "plain"
  plain.mkdir()
  assert target.stat().st_mode == plain.stat().st_mode


def test_target_is_never_overwritten(tmp_path):
  (tmp_path / "x").write_text("kept")
  for target in (tmp_path, tmp_path / "x"):
    with pytest.raises(ValueError, match="exists and is not"):
      folder.Staged(str(target))
  assert [p.name for p in tmp_path.iterdir()] == ["x"]
