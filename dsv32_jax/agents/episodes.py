"""Episodes as tables: JSONL and Parquet with one schema, docs/agent_data.md."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
import pathlib
from typing import Any

import pyarrow as pa

from dsv32_jax.agents import loop
from dsv32_jax.agents import tables

_TYPES = {
  "str": pa.string(),
  "int": pa.int64(),
  "float": pa.float64(),
}


def _type_of(field: dataclasses.Field) -> pa.DataType:
  name = getattr(field.type, "__name__", field.type)
  return _TYPES.get(name, pa.string())  # messages, as JSON text


SCHEMA = pa.schema(
  {
    field.name: _type_of(field)
    for field in dataclasses.fields(loop.EpisodeResult)
  }
)


def export(source: pathlib.Path, stem: pathlib.Path) -> None:
  """Writes `stem`.jsonl and `stem`.parquet of the results of `run_many`.

  Args:
    source: JSONL of rows as of `EpisodeResult.row`; further fields stay behind.
    stem: path without an ending, another than the source's.

  Raises:
    ValueError: a row lacks a field, or the stem is the source's.
  """
  if source == stem.with_suffix(".jsonl"):
    raise ValueError(f"{stem=} would be written over its source")
  tables.write(stem, rows(tables.read_jsonl(source), source), SCHEMA)


def rows(
  found: Iterable[Mapping[str, Any]], source: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Yields the columns of each row, messages as JSON text."""
  for number, row in enumerate(found, 1):
    missing = [name for name in SCHEMA.names if name not in row]
    if missing:
      raise ValueError(f"{source}:{number}: no field {missing[0]!r}")
    yield {
      name: json.dumps(row[name], ensure_ascii=False)
      if name == "messages"
      else row[name]
      for name in SCHEMA.names
    }


def load(row: Mapping[str, Any]) -> loop.EpisodeResult:
  """Makes an episode's result of a row of either file."""
  return loop.EpisodeResult(**{**row, "messages": json.loads(row["messages"])})
