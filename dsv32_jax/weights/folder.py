"""A checkpoint folder: found, checked and opened, or written all or nothing."""

from collections.abc import Mapping
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from dsv32_jax.weights import safetensors
from dsv32_jax.weights import strict_json

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")


def _inside(folder: str, name: str, where: str) -> str:
  """Returns the path of a plain file name in a folder, links resolved.

  A link may lead out of the folder only from a snapshot of the Hugging Face
  cache to the blobs of the same repository, which is how that cache stores
  files.

  Raises:
    ValueError: the name has a folder in it, or the file is elsewhere.
  """
  if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
    raise ValueError(f"{where}: file {name!r} is not a plain file name")
  root = pathlib.Path(folder).resolve()
  file = (root / name).resolve()
  allowed = [root]
  if root.parent.name == "snapshots":
    allowed.append(root.parent.parent / "blobs")
  if file.parent not in allowed:
    raise ValueError(f"{where}: file {name!r} leads out of the folder")
  if not file.is_file():
    raise ValueError(f"{where}: file {name!r} does not exist")
  return str(root / name)


def read_config(folder: str) -> tuple[str, dict[str, Any]]:
  """Returns the path and the content of a folder's config.json.

  Raises:
    ValueError: the folder or the file is missing, leads elsewhere, or is not
      strict JSON.
  """
  folder = os.fspath(folder)
  if not os.path.isdir(folder):
    raise ValueError(f"{folder}: no such folder")
  path = _inside(folder, "config.json", folder)
  return path, strict_json.read_object(path)


def _from_index(folder: str, path: str) -> dict[str, safetensors.Entry]:
  weight_map = strict_json.read_object(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{path}: weight_map is missing or empty")
  for name, file in weight_map.items():
    if not isinstance(file, str) or not file.endswith(".safetensors"):
      raise ValueError(
        f"{path}: tensor {name!r}: {file!r} is not a safetensors file"
      )
  files = {
    file: _inside(folder, file, path)
    for file in sorted(set(weight_map.values()))
  }
  entries = {}
  for file, file_path in files.items():
    header = safetensors.read_header(file_path)
    for name, entry in header.items():
      if weight_map.get(name) != file:
        raise ValueError(
          f"{file_path}: tensor {name!r} is not in this file by {INDEX}"
        )
      entries[name] = entry
  for name, file in weight_map.items():
    if name not in entries:
      raise ValueError(f"{files[file]}: tensor {name!r} is missing")
  return entries


def open_tensors(folder: str) -> dict[str, safetensors.Entry]:
  """Finds every tensor of a checkpoint folder; reads headers, no data.

  With `model.safetensors.index.json` the files it names are read; without it
  the folder must hold exactly one safetensors file.

  Raises:
    ValueError: naming file and tensor: no weights, weights in pickles only, a
      path that leaves the folder, an index and files that disagree, or a bad
      header.
  """
  folder = os.fspath(folder)
  if not os.path.isdir(folder):
    raise ValueError(f"{folder}: no such folder")
  files = sorted(os.listdir(folder))
  single = [name for name in files if name.endswith(".safetensors")]
  if INDEX in files:
    index = _inside(folder, INDEX, folder)
    return _from_index(folder, index)
  if len(single) == 1:
    return safetensors.read_header(_inside(folder, single[0], folder))
  if single:
    raise ValueError(
      f"{folder}: {len(single)} safetensors files and no {INDEX}"
    )
  pickles = [name for name in files if name.endswith(_PICKLES)]
  if pickles:
    raise ValueError(
      f"{folder}: no safetensors file; {pickles[0]!r} may run code when read "
      "and is refused"
    )
  raise ValueError(f"{folder}: no safetensors file")


def _assign(
  specs: Mapping[str, safetensors.Spec], max_shard_bytes: int | None
) -> list[list[str]]:
  """Splits names, in order, into files of at most max_shard_bytes of data."""
  shards: list[list[str]] = [[]]
  reached = 0
  for name, spec in specs.items():
    full = max_shard_bytes is not None and (
      reached + spec.num_bytes > max_shard_bytes
    )
    if full and shards[-1]:
      shards.append([])
      reached = 0
    shards[-1].append(name)
    reached += spec.num_bytes
  return shards


def check_target(target: str) -> None:
  """Refuses a target that would be overwritten.

  Raises:
    ValueError: the target is a file or a folder that is not empty.
  """
  if os.path.islink(target) or os.path.isfile(target):
    raise ValueError(f"{target=} exists and is not a folder")
  if os.path.isdir(target) and os.listdir(target):
    raise ValueError(f"{target=} exists and is not empty")


class Staged:
  """A folder that appears under its name when complete, or not at all.

  Work happens in `.path`, a hidden sibling of the target; leaving the context
  without an exception renames it, leaving it with one removes it.
  """

  def __init__(self, target: str):
    self._target = os.path.abspath(target)
    check_target(self._target)
    parent, name = os.path.split(self._target)
    os.makedirs(parent, exist_ok=True)
    self.path = tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent)

  def __enter__(self) -> "Staged":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if kind is not None:
      shutil.rmtree(self.path, ignore_errors=True)
      return
    try:
      # mkdtemp makes folders private; this one gets what mkdir would give.
      mask = os.umask(0)
      os.umask(mask)
      os.chmod(self.path, 0o777 & ~mask)
      os.rename(self.path, self._target)
    except BaseException:
      shutil.rmtree(self.path, ignore_errors=True)
      raise


class Writer:
  """Writes a checkpoint's tensors, in any order, one at a time.

  Args:
    folder: where the files go; it exists.
    specs: every tensor that will be written.
    max_shard_bytes: most bytes of data in a file, unless a single tensor has
      more; None writes one file.
  """

  def __init__(
    self,
    folder: str,
    specs: Mapping[str, safetensors.Spec],
    max_shard_bytes: int | None,
  ):
    if max_shard_bytes is not None and max_shard_bytes < 1:
      raise ValueError(f"{max_shard_bytes=} must be positive")
    self._folder, self._specs = folder, dict(specs)
    self._missing = set(specs)
    self._place: dict[str, tuple[str, int]] = {}
    shards = _assign(specs, max_shard_bytes)
    for number, names in enumerate(shards, start=1):
      file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
      file = "model.safetensors" if len(shards) == 1 else file
      header, starts = safetensors.layout(specs, names)
      size = sum(specs[name].num_bytes for name in names)
      with open(os.path.join(folder, file), "xb") as handle:
        handle.write(header)
        handle.truncate(len(header) + size)
      self._place |= {name: (file, start) for name, start in starts.items()}
    if len(shards) > 1:
      self._write_index()

  def _write_index(self) -> None:
    size = sum(spec.num_bytes for spec in self._specs.values())
    write_json(
      os.path.join(self._folder, INDEX),
      {
        "metadata": {"total_size": size},
        "weight_map": {name: self._place[name][0] for name in self._specs},
      },
    )

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes one tensor, which must be as its spec says."""
    spec = self._specs[name]
    assert array.shape == spec.shape, (name, array.shape, spec)
    assert array.dtype == safetensors.DTYPES[spec.dtype], (name, array.dtype)
    file, start = self._place[name]
    with open(os.path.join(self._folder, file), "r+b") as handle:
      handle.seek(start)
      data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
      handle.write(memoryview(data))
    self._missing.remove(name)

  def finish(self) -> None:
    """Flushes the files to disk; every tensor must have been written."""
    assert not self._missing, sorted(self._missing)[:3]
    for file in sorted({file for file, _ in self._place.values()}):
      with open(os.path.join(self._folder, file), "rb") as handle:
        os.fsync(handle.fileno())


def write_json(path: str, value: Mapping[str, Any]) -> None:
  """Writes a JSON file, indented, with a newline at its end."""
  with open(path, "x", encoding="utf-8") as file:
    json.dump(value, file, indent=2)
    file.write("\n")
