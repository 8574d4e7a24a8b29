"""The safetensors format, read strictly and written tensor by tensor.

A file is 8 bytes of little-endian header length, a JSON header that gives
each tensor's dtype, shape and byte range, and the bytes. Rows are read from
the file when asked for, so a process holds no more than what it works on, and
a file cut short while in use is an error where a memory map would be a crash.
float8 is why this module exists: the format's own library cannot give an
array of it to numpy. Format: github.com/huggingface/safetensors.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from dsv32_jax.weights import strict_json

MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 8

DTYPES: dict[str, np.dtype] = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype("<u2"),
  "I16": np.dtype("<i2"),
  "U32": np.dtype("<u4"),
  "I32": np.dtype("<i4"),
  "U64": np.dtype("<u8"),
  "I64": np.dtype("<i8"),
  "F16": np.dtype("<f2"),
  "F32": np.dtype("<f4"),
  "F64": np.dtype("<f8"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What a tensor is: a dtype by its safetensors name, and a shape."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    """Bytes of its data."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One tensor of one file; `start` counts bytes from the file's beginning."""

  path: str
  name: str
  spec: Spec
  start: int

  def read_rows(self, first: int, last: int) -> np.ndarray:
    """Reads rows first to last - 1 of the leading axis, as stored.

    Raises:
      ValueError: the file ends before the rows do, or cannot be read.
    """
    shape, dtype = self.spec.shape, DTYPES[self.spec.dtype]
    assert 0 <= first <= last <= shape[0], (self.name, first, last, shape)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    rows = np.empty((last - first, *shape[1:]), dtype)
    view = memoryview(rows.reshape(-1).view(np.uint8))
    try:
      with open(self.path, "rb", buffering=0) as file:
        file.seek(self.start + first * row_bytes)
        done = 0
        while done < len(view):
          count = file.readinto(view[done:])
          if not count:
            raise ValueError(
              f"{self.path}: tensor {self.name!r}: the file ends before it does"
            )
          done += count
    except OSError as error:
      raise ValueError(f"{self.path}: {error.strerror}") from None
    return rows

  def read(self) -> np.ndarray:
    """Reads the whole tensor."""
    if not self.spec.shape:
      whole = dataclasses.replace(
        self, spec=Spec(dtype=self.spec.dtype, shape=(1,))
      )
      return whole.read_rows(0, 1).reshape(())
    return self.read_rows(0, self.spec.shape[0])


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


def _parse_spec(
  path: str, name: str, fields: Any
) -> tuple[Spec, tuple[int, int]]:
  """Checks one header entry and returns its spec and byte range."""
  where = f"{path}: tensor {name!r}"
  wanted = {"dtype", "shape", "data_offsets"}
  if not isinstance(fields, dict) or set(fields) != wanted:
    raise ValueError(f"{where}: a header entry has the fields {sorted(wanted)}")
  dtype, shape, offsets = (
    fields[key] for key in ("dtype", "shape", "data_offsets")
  )
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(f"{where}: unknown {dtype=}")
  if (
    not isinstance(shape, list)
    or len(shape) > _MAX_RANK
    or not all(map(_is_size, shape))
  ):
    raise ValueError(f"{where}: bad {shape=}")
  if (
    not isinstance(offsets, list)
    or len(offsets) != 2
    or not all(map(_is_size, offsets))
    or offsets[0] > offsets[1]
  ):
    raise ValueError(f"{where}: bad data_offsets={offsets}")
  spec = Spec(dtype=dtype, shape=tuple(shape))
  if offsets[1] - offsets[0] != spec.num_bytes:
    raise ValueError(
      f"{where}: {dtype} {shape} takes {spec.num_bytes} bytes and "
      f"data_offsets={offsets} hold {offsets[1] - offsets[0]}"
    )
  return spec, (offsets[0], offsets[1])


def read_header(path: str) -> dict[str, Entry]:
  """Reads and checks the header of a safetensors file.

  Returns:
    Its tensors by name, in the order of their bytes.

  Raises:
    ValueError: naming the file and, where there is one, the tensor: a header
      that is cut off, too large or not strict JSON, an unknown dtype, sizes
      that disagree, byte ranges that overlap, leave the file, or leave bytes
      that belong to no tensor.
  """
  path = os.fspath(path)
  try:
    with open(path, "rb") as file:
      file_bytes = os.fstat(file.fileno()).st_size
      prefix = file.read(8)
      header_bytes = int.from_bytes(prefix, "little")
      if len(prefix) < 8:
        raise ValueError(f"{path}: truncated: no safetensors header")
      if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: not safetensors, or {header_bytes=} is huge")
      text = file.read(header_bytes)
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}") from None
  if len(text) < header_bytes:
    raise ValueError(f"{path}: truncated within the header")
  if not text.startswith(b"{"):
    raise ValueError(f"{path}: the safetensors header must begin with {{")
  header = strict_json.parse_object(text, path)
  header.pop("__metadata__", None)
  parsed = [
    (offsets, name, spec)
    for name, fields in header.items()
    for spec, offsets in [_parse_spec(path, name, fields)]
  ]
  parsed.sort(key=lambda item: item[0])
  entries, reached, data_start = {}, 0, 8 + header_bytes
  for (start, stop), name, spec in parsed:
    if start < reached:
      raise ValueError(f"{path}: tensor {name!r} overlaps the one before it")
    if start > reached:
      raise ValueError(f"{path}: tensor {name!r}: unused bytes before it")
    if data_start + stop > file_bytes:
      raise ValueError(f"{path}: truncated: tensor {name!r} leaves the file")
    entries[name] = Entry(
      path=path, name=name, spec=spec, start=data_start + start
    )
    reached = stop
  if data_start + reached != file_bytes:
    raise ValueError(f"{path}: trailing bytes after the last tensor")
  return entries


def layout(
  specs: Mapping[str, Spec], names: Sequence[str]
) -> tuple[bytes, dict[str, int]]:
  """Lays out one file that holds `names`.

  Wide dtypes come first, so that every tensor is aligned to its own size,
  which readers that map the file rely on.

  Returns:
    The bytes before the data, and each tensor's byte in the file.
  """
  ordered = sorted(
    names, key=lambda name: (-DTYPES[specs[name].dtype].itemsize, name)
  )
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  reached = 0
  for name in ordered:
    spec = specs[name]
    stop = reached + spec.num_bytes
    header[name] = {
      "dtype": spec.dtype,
      "shape": list(spec.shape),
      "data_offsets": [reached, stop],
    }
    reached = stop
  text = json.dumps(header, separators=(",", ":")).encode("utf-8")
  text += b" " * (-len(text) % 8)
  data_start = 8 + len(text)
  starts = {
    name: data_start + header[name]["data_offsets"][0] for name in ordered
  }
  return len(text).to_bytes(8, "little") + text, starts
