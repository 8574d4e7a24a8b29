"""The safetensors reader: what is well formed is read, all else refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as library

from dsv32_jax.weights import folder
from dsv32_jax.weights import safetensors

GOOD = {
  "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
  "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
}


def write(path, header, data=bytes(34)):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)
  return str(path)


def changed(name, **fields):
  return GOOD | {name: GOOD[name] | fields}


def test_reads_what_the_library_writes(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    "x": rng.standard_normal((7, 3), np.float32),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "half": rng.standard_normal((5, 2)).astype(ml_dtypes.bfloat16),
    "count": np.arange(4),
  }
  library.save_file(arrays, tmp_path / "x.safetensors")
  entries = safetensors.read_header(tmp_path / "x.safetensors")
  assert set(entries) == set(arrays)
  for name, array in arrays.items():
    found = entries[name].read()
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()
  rows = entries["x"].read_rows(2, 5)
  np.testing.assert_array_equal(rows, arrays["x"][2:5])


def test_writes_what_the_library_reads(tmp_path):
  rng = np.random.default_rng(1)
  arrays = {
    "odd": rng.standard_normal((3, 5)).astype(ml_dtypes.float8_e4m3fn),
    "x": rng.standard_normal((4, 3), np.float32),
    "half": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
  }
  codes = {"odd": "F8_E4M3", "x": "F32", "half": "BF16"}
  specs = {
    name: safetensors.Spec(dtype=codes[name], shape=array.shape)
    for name, array in arrays.items()
  }
  writer = folder.Writer(str(tmp_path), specs, None)
  for name, array in arrays.items():
    writer.write(name, array)
  writer.finish()
  found = folder.open_tensors(tmp_path)
  for name, array in arrays.items():
    assert found[name].read().tobytes() == array.tobytes()
    size = array.dtype.itemsize
    assert found[name].start % size == 0, "readers that map need alignment"
  del arrays["odd"]
  (tmp_path / "model.safetensors").rename(tmp_path / "y")
  plain = {name: specs[name] for name in arrays}
  writer = folder.Writer(str(tmp_path), plain, None)
  for name, array in arrays.items():
    writer.write(name, array)
  for name, array in library.load_file(tmp_path / "model.safetensors").items():
    np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
  ("header", "message"),
  [
    (changed("b", dtype="F12"), "'b': unknown dtype='F12'"),
    (changed("b", dtype=["F32"]), "'b': unknown dtype"),
    (changed("b", shape=[6]), r"'b': BF16 \[6\] takes 12 bytes .* hold 10"),
    (changed("b", shape=[-5]), r"'b': bad shape=\[-5\]"),
    (changed("b", shape=[True]), "'b': bad shape"),
    (changed("b", shape=5), "'b': bad shape"),
    (changed("b", shape=[1] * 9), "'b': bad shape"),
    (changed("b", shape=[2**62, 2**62]), "'b': BF16"),
    (changed("b", data_offsets=[34, 24]), "'b': bad data_offsets"),
    (changed("b", data_offsets=[24]), "'b': bad data_offsets"),
    (changed("b", data_offsets=[-10, 0]), "'b': bad data_offsets"),
    (changed("b", data_offsets=[24.0, 34.0]), "'b': bad data_offsets"),
    (changed("b", data_offsets=[14, 24]), "'b' overlaps"),
    (changed("b", data_offsets=[34, 44]), "'b': unused bytes before it"),
    (GOOD | {"c": {"dtype": "F32", "shape": []}}, "'c': a header entry has"),
    (GOOD | {"c": 3}, "'c': a header entry has"),
    (
      GOOD | {"c": {"dtype": "U8", "shape": [1], "data_offsets": [34, 35]}},
      "truncated: tensor 'c' leaves the file",
    ),
    ({"a": GOOD["a"]}, "trailing bytes"),
    (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "duplicate key 'dtype'"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON"),
    (b'{"a":' + b"[" * 100_000, "bad JSON|too deeply nested"),
    (b'{"a"', "bad JSON"),
    (b'{"\xff": 1}', "bad JSON"),
    (b"[]", "must begin with"),
    (b" {}", "must begin with"),
  ],
)
def test_bad_header(tmp_path, header, message):
  path = write(tmp_path / "m.safetensors", header)
  with pytest.raises(ValueError, match=message) as caught:
    safetensors.read_header(path)
  assert "m.safetensors" in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 8, 60, 160])
def test_truncated(tmp_path, size):
  path = tmp_path / "m.safetensors"
  write(path, GOOD)
  whole = path.read_bytes()
  assert len(whole) > 160
  path.write_bytes(whole[:size])
  with pytest.raises(ValueError, match=r"m.safetensors: truncated"):
    safetensors.read_header(str(path))


def test_huge_header(tmp_path):
  path = tmp_path / "m.safetensors"
  path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
  with pytest.raises(ValueError, match="huge"):
    safetensors.read_header(str(path))


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
  path = tmp_path / "m.safetensors"
  write(path, GOOD)
  entry = safetensors.read_header(str(path))["b"]
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match="tensor 'b': the file ends"):
    entry.read()


def test_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"none.safetensors: No such file"):
    safetensors.read_header(str(tmp_path / "none.safetensors"))
