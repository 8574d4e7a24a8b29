"""Records: what a source yields, and what makes one malformed."""

from collections.abc import Iterable
import hashlib
import json

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parse_record(line: bytes, fields: tuple[str, ...]) -> dict[str, str]:
  """Reads one JSON object.

  Args:
    line: UTF-8 bytes.
    fields: keys that must be there, each with a non-empty string.

  Returns:
    Those fields.

  Raises:
    ValueError: invalid UTF-8, not a JSON object, a key given twice, a field
      missing, empty, no string, or one that holds half a surrogate pair.
  """
  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"invalid UTF-8: {error.reason}") from error
  try:
    record = json.loads(text, object_pairs_hook=_without_duplicates)
  except RecursionError as error:
    raise ValueError("bad JSON: nested too deep") from error
  except ValueError as error:
    raise ValueError(f"bad JSON: {error}") from error
  if not isinstance(record, dict):
    raise ValueError(f"bad JSON: {type(record).__name__}, not an object")
  check_record(record, fields)
  return {field: record[field] for field in fields}


def _without_duplicates(pairs):
  record = dict(pairs)
  if len(record) != len(pairs):
    raise ValueError("a key is given twice")
  return record


def check_record(record: dict, fields: tuple[str, ...]):
  """Raises ValueError unless every field is a non-empty, encodable string."""
  for field in fields:
    if field not in record:
      raise ValueError(f"no field {field!r}")
    value = record[field]
    if not isinstance(value, str):
      raise ValueError(f"field {field!r} is {type(value).__name__}, not string")
    if not value:
      raise ValueError(f"field {field!r} is empty")
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(f"field {field!r}: {error.reason}") from error


def text_fault(content: bytes) -> str | None:
  """Returns what keeps a text file's bytes from being a document, or None."""
  if not content.removeprefix(BYTE_ORDER_MARK):
    return "empty file"
  try:
    content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    return f"invalid UTF-8 in line {line}: {error.reason}"
  return None


def identity(parts: Iterable[tuple]) -> str:
  """Returns the sha256 of JSON-able parts, as hex digits."""
  return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
