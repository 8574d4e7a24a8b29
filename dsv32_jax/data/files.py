"""Random access to the records of text, JSONL, Parquet, ArrayRecord files.

Text and JSONL have no index of their own, so opening reads and checks them
whole; Parquet's columns of interest are held in memory; ArrayRecord is checked
file by file when opened and record by record when read, and is the format for
corpora larger than memory (`write_array_record` makes one).
"""

import array
import bisect
from collections.abc import Iterable, Sequence
import json
import mmap
import os

from array_record.python import array_record_module
import pyarrow
from pyarrow import parquet

from dsv32_jax.data import records
from dsv32_jax.data.bad_records import BadRecords


def write_array_record(path: str | os.PathLike, rows: Iterable[dict]):
  """Writes records as JSON objects into one ArrayRecord file.

  Args:
    path: file to write.
    rows: JSON-able dicts.
  """
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for row in rows:
    writer.write(json.dumps(row, ensure_ascii=False).encode())
  writer.close()


class TextFiles:
  """One document a file."""

  def __init__(self, paths: Sequence[str], field: str, bad_records: BadRecords):
    self._field = field
    self._paths = []
    sizes = []
    for path in paths:
      with open(path, "rb") as file:
        content = file.read()
      reason = records.text_fault(content)
      if reason:
        bad_records.add(path, 0, reason)
        continue
      self._paths.append(path)
      sizes.append((os.path.basename(path), len(content)))
    self.identity = records.identity(sizes)

  def __len__(self):
    return len(self._paths)

  def __getitem__(self, index):
    with open(self._paths[index], "rb") as file:
      return {self._field: file.read().decode("utf-8-sig")}

  def place(self, index):
    """Returns the file's path, and 0."""
    return self._paths[index], 0


class JsonLines:
  """One JSON object a line; blank lines are no records."""

  def __init__(
    self,
    paths: Sequence[str],
    fields: tuple[str, ...],
    bad_records: BadRecords,
  ):
    self._fields = fields
    self._maps: list[tuple[str, mmap.mmap]] = []
    # Of each record in turn: file, line, start, end.
    self._spans = array.array("q")
    sizes = []
    for path in paths:
      sizes.append((os.path.basename(path), os.path.getsize(path)))
      if not sizes[-1][1]:
        bad_records.add(path, 0, "empty file")
        continue
      with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      self._maps.append((path, content))
      self._index(bad_records)
    self.identity = records.identity(sizes)

  def _index(self, bad_records: BadRecords):
    """Checks every line of the last file and notes where the good ones are."""
    path, content = self._maps[-1]
    start = (
      len(records.BYTE_ORDER_MARK)
      if content[:3] == records.BYTE_ORDER_MARK
      else 0
    )
    number = 0
    while start < len(content):
      newline = content.find(b"\n", start)
      end = len(content) if newline < 0 else newline
      number += 1
      line = content[start:end]
      if line.strip():
        try:
          records.parse_record(line, self._fields)
        except ValueError as error:
          bad_records.add(path, number, str(error))
        else:
          self._spans.extend((len(self._maps) - 1, number, start, end))
      start = end + 1

  def __len__(self):
    return len(self._spans) // 4

  def __getitem__(self, index):
    file, _, start, end = self._spans[4 * index : 4 * index + 4]
    return records.parse_record(self._maps[file][1][start:end], self._fields)

  def place(self, index):
    """Returns the file's path and the line, from 1."""
    file, number = self._spans[4 * index : 4 * index + 2]
    return self._maps[file][0], number


class ParquetFiles:
  """One record a row; the columns of interest are held in memory."""

  def __init__(
    self,
    paths: Sequence[str],
    fields: tuple[str, ...],
    bad_records: BadRecords,
  ):
    self._fields = fields
    self._tables: list[tuple[str, pyarrow.Table]] = []
    # Of each record in turn: file, row.
    self._rows = array.array("q")
    sizes = []
    for path in paths:
      sizes.append((os.path.basename(path), os.path.getsize(path)))
      try:
        table = self._read(path)
      except ValueError as error:
        bad_records.add(path, 0, str(error))
        continue
      self._tables.append((path, table))
      self._index(bad_records)
    self.identity = records.identity(sizes)

  def _read(self, path: str) -> pyarrow.Table:
    """Returns the columns of interest; ValueError says what is wrong."""
    if not os.path.getsize(path):
      raise ValueError("empty file")
    try:
      with parquet.ParquetFile(path) as file:
        absent = sorted(set(self._fields) - set(file.schema_arrow.names))
        if absent:
          raise ValueError(f"no column {absent}")
        table = file.read(columns=list(self._fields))
    # Corrupt pages surface as OSError, a corrupt footer as ArrowException.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      raise ValueError(f"not a whole Parquet file: {_line(error)}") from error
    for field in self._fields:
      column_type = table.schema.field(field).type
      if not _is_string(column_type):
        raise ValueError(f"column {field!r} is {column_type}, not string")
    if not table.num_rows:
      raise ValueError("empty file: no rows")
    return table.combine_chunks()

  def _index(self, bad_records: BadRecords):
    path, table = self._tables[-1]
    for row in range(table.num_rows):
      try:
        records.check_record(self._record(table, row), self._fields)
      except ValueError as error:
        bad_records.add(path, row + 1, str(error))
      else:
        self._rows.extend((len(self._tables) - 1, row))

  def _record(self, table: pyarrow.Table, row: int) -> dict:
    try:
      return {field: table[field][row].as_py() for field in self._fields}
    except UnicodeDecodeError as error:
      raise ValueError(f"invalid UTF-8: {error.reason}") from error

  def __len__(self):
    return len(self._rows) // 2

  def __getitem__(self, index):
    file, row = self._rows[2 * index : 2 * index + 2]
    return self._record(self._tables[file][1], row)

  def place(self, index):
    """Returns the file's path and the row, from 1."""
    file, row = self._rows[2 * index : 2 * index + 2]
    return self._tables[file][0], row + 1


class ArrayRecordFiles:
  """One JSON object a record, read and checked when asked for."""

  def __init__(
    self,
    paths: Sequence[str],
    fields: tuple[str, ...],
    bad_records: BadRecords,
  ):
    self._fields = fields
    self._bad_records = bad_records
    self._readers: list[tuple[str, object]] = []
    # Number of records up to and with each file.
    self._ends: list[int] = []
    self._faults: set[int] = set()
    sizes = []
    for path in paths:
      sizes.append((os.path.basename(path), os.path.getsize(path)))
      try:
        reader = self._open(path)
      except (RuntimeError, ValueError, IndexError) as error:
        bad_records.add(
          path, 0, f"not a whole ArrayRecord file: {_line(error)}"
        )
        continue
      self._readers.append((path, reader))
      self._ends.append(len(self) + reader.num_records())
    self.identity = records.identity(sizes)

  def _open(self, path: str):
    """Returns a reader of at least one record, or raises what is wrong."""
    reader = array_record_module.ArrayRecordReader(path)
    num_records = reader.num_records()
    if not reader.ok():
      # A damaged file has no records, and says why when it is closed.
      reader.close()
    if not num_records:
      raise ValueError("empty file: no records")
    return reader

  def __len__(self):
    return self._ends[-1] if self._ends else 0

  def _find(self, index: int) -> tuple[int, int]:
    file = bisect.bisect_right(self._ends, index)
    return file, index - (self._ends[file - 1] if file else 0)

  def __getitem__(self, index):
    file, row = self._find(index)
    path, reader = self._readers[file]
    try:
      return records.parse_record(reader.read([row])[0], self._fields)
    # The library raises RuntimeError where a record's checksum is wrong.
    except (RuntimeError, ValueError, IndexError) as error:
      self._bad_records.add(path, row + 1, _line(error))
      self._faults.add(index)
    if len(self._faults) == len(self):
      raise ValueError(f"{path}: has no usable record")
    return None

  def place(self, index):
    """Returns the file's path and the record, from 1."""
    file, row = self._find(index)
    return self._readers[file][0], row + 1


def _is_string(column_type: pyarrow.DataType) -> bool:
  return pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(
    column_type
  )


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]
