"""The data sets of a mixture: what they are, and opening them.

A source has a length, gives the record of an index, and names an index's file
and place. A record is a dict of the configured fields, every value a non-empty
string.
"""

from collections.abc import Callable, Iterator
import dataclasses
import glob
import math
import os
from typing import Protocol

from dsv32_jax.data import corpus
from dsv32_jax.data import files
from dsv32_jax.data import records
from dsv32_jax.data.bad_records import BadRecords


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """One data set of a mixture.

  Attributes:
    kind: "stdlib_train" or "stdlib_held_out" (Python's own source files),
      "text" (a document a file), "jsonl", "parquet" or "array_record" (each
      record a JSON object).
    path: glob of the files, ** included; None for the standard library.
    weight: share of the training rows, relative to the other sources.
    text_field: field with the document.
    prompt_field: field with the user's words. With response_field, in place of
      text_field: supervised fine-tuning, where the response alone is learnt.
    response_field: field with the answer.
    pieces_field: field with a whole conversation, tool calls and all, as
      `pieces` reads it, in place of the other fields.
  """

  kind: str
  path: str | None = None
  weight: float = 1.0
  text_field: str = "text"
  prompt_field: str | None = None
  response_field: str | None = None
  pieces_field: str | None = None

  def __post_init__(self):
    if self.kind not in _OPEN:
      raise ValueError(f"source kind={self.kind!r} is none of {list(_OPEN)}")
    if (self.path is None) != (self.kind in _EMBEDDED):
      raise ValueError(
        f"source path={self.path!r} does not go with kind={self.kind!r}"
      )
    if not 0 < self.weight < math.inf:
      raise ValueError(f"source weight={self.weight} must be positive")
    if (self.prompt_field is None) != (self.response_field is None):
      raise ValueError(
        f"source prompt_field={self.prompt_field!r} and"
        f" response_field={self.response_field!r} go together"
      )
    if self.prompt_field and self.pieces_field:
      raise ValueError(
        f"source prompt_field={self.prompt_field!r} and"
        f" pieces_field={self.pieces_field!r} exclude each other"
      )
    for name in ("prompt_field", "pieces_field"):
      if getattr(self, name) and self.kind not in _STRUCTURED:
        raise ValueError(
          f"source {name}={getattr(self, name)!r} does not go with"
          f" kind={self.kind!r}"
        )

  @property
  def fields(self) -> tuple[str, ...]:
    """Returns the fields that a record must have."""
    if self.pieces_field is not None:
      return (self.pieces_field,)
    if self.prompt_field is not None:
      return (self.prompt_field, self.response_field)
    return (self.text_field,)


class Source(Protocol):
  """What every source offers. Reading is thread-safe.

  Attributes:
    identity: sha256 of what the source holds: a resumed run must find the
      same. Of a file it takes name and size, not the folder it lies in.
  """

  identity: str

  def __len__(self) -> int:
    """Returns the number of records, without those found bad on opening."""

  def __getitem__(self, index: int) -> dict[str, str] | None:
    """Returns the record, or None if it proves bad (then it is reported)."""

  def place(self, index: int) -> tuple[str, int]:
    """Returns file and line or row of a record, as in `bad_records`."""


def open_source(config: SourceConfig, bad_records: BadRecords) -> Source:
  """Opens the files of a source.

  Args:
    config: which files, which fields.
    bad_records: takes what is malformed.

  Returns:
    A source of at least one record.

  Raises:
    ValueError: no file matches, more bad records than the budget allows, or no
      record is left.
  """
  source = _OPEN[config.kind](config, bad_records)
  if not len(source):
    raise ValueError(
      f"source kind={config.kind!r} path={config.path!r} has no usable record"
    )
  return source


def sample_texts(source: Source, num_characters: int) -> Iterator[str]:
  """Yields texts spread evenly over a source, for training a tokenizer.

  Args:
    source: where from.
    num_characters: stops once that many are out.
  """
  length = len(source)
  # A stride that shares no factor with the length visits every record once.
  stride = max(1, round(length * 0.618034))
  while math.gcd(stride, length) != 1:
    stride += 1
  done = 0
  for step in range(length):
    if done >= num_characters:
      return
    for text in (source[step * stride % length] or {}).values():
      done += len(text)
      yield text


class Documents:
  """Documents in memory, such as the standard library's."""

  def __init__(self, documents: tuple[corpus.Document, ...], field: str):
    self._documents = documents
    self._field = field
    self.identity = records.identity(
      (document.name, document.sha256) for document in documents
    )

  def __len__(self):
    return len(self._documents)

  def __getitem__(self, index):
    return {self._field: self._documents[index].text}

  def place(self, index):
    """Returns the file's name below the library's folder, and 0."""
    return self._documents[index].name, 0


def _stdlib_train(config: SourceConfig, bad_records: BadRecords):
  del bad_records  # What the corpus leaves out, it counts itself.
  return Documents(corpus.stdlib_documents().train, config.text_field)


def _stdlib_held_out(config: SourceConfig, bad_records: BadRecords):
  del bad_records
  return Documents(corpus.stdlib_documents().held_out, config.text_field)


def _text(config: SourceConfig, bad_records: BadRecords):
  return files.TextFiles(_matching(config), config.text_field, bad_records)


def _jsonl(config: SourceConfig, bad_records: BadRecords):
  return files.JsonLines(_matching(config), config.fields, bad_records)


def _parquet(config: SourceConfig, bad_records: BadRecords):
  return files.ParquetFiles(_matching(config), config.fields, bad_records)


def _array_record(config: SourceConfig, bad_records: BadRecords):
  return files.ArrayRecordFiles(_matching(config), config.fields, bad_records)


def _matching(config: SourceConfig) -> list[str]:
  """Returns the files of a glob, sorted; none is a ValueError."""
  if os.path.isdir(config.path):
    raise ValueError(
      f"source path={config.path!r} is a folder: give a glob of its files"
    )
  paths = sorted(
    path
    for path in glob.glob(config.path, recursive=True)
    if os.path.isfile(path)
  )
  if not paths:
    raise ValueError(f"source path={config.path!r} matches no file")
  return paths


_OPEN: dict[str, Callable[[SourceConfig, BadRecords], Source]] = {
  "stdlib_train": _stdlib_train,
  "stdlib_held_out": _stdlib_held_out,
  "text": _text,
  "jsonl": _jsonl,
  "parquet": _parquet,
  "array_record": _array_record,
}
_EMBEDDED = ("stdlib_train", "stdlib_held_out")
_STRUCTURED = ("jsonl", "parquet", "array_record")
