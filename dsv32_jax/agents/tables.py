"""Rows as JSONL and as Parquet, each file there only once it is whole.

What a table of tasks or episodes holds is in docs/agent_data.md. A value that
is a list or an object stands as JSON text in one column, so that both forms
hold the same and a reader needs no schema of ours.
"""

from collections.abc import Iterable, Iterator, Mapping
import json
import pathlib
from typing import Any

import pyarrow as pa
from pyarrow import parquet

_BATCH = 256


def write(
  stem: pathlib.Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema
) -> None:
  """Writes `stem`.jsonl and `stem`.parquet, a batch at a time.

  Raises:
    ValueError: a row has other columns than the schema.
  """
  lines, table = stem.with_suffix(".jsonl"), stem.with_suffix(".parquet")
  write_jsonl(lines, _checked(rows, schema, stem))
  partial = table.with_suffix(".partial")
  with parquet.ParquetWriter(partial, schema) as writer:
    batch = []
    for row in read_jsonl(lines):
      batch.append(row)
      if len(batch) == _BATCH:
        writer.write_table(pa.Table.from_pylist(batch, schema))
        batch = []
    if batch:
      writer.write_table(pa.Table.from_pylist(batch, schema))
  partial.replace(table)


def write_jsonl(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes a line a row."""
  partial = path.with_suffix(".partial")
  with partial.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
  partial.replace(path)


def read_jsonl(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the rows of a JSONL file.

  Raises:
    ValueError: naming file and line, if one is no JSON object.
  """
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: {error}") from error
      if not isinstance(row, dict):
        raise ValueError(f"{path}:{number} is not a JSON object")
      yield row


def _checked(rows, schema, stem):
  for row in rows:
    if list(row) != schema.names:
      raise ValueError(
        f"{stem.name}: a row has the columns {list(row)}, not {schema.names}"
      )
    yield row
