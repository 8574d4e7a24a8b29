"""JSON files that nobody vouches for, read strictly.

The standard parser keeps the last of two equal keys, accepts NaN, and fails
in several ways on hostile input. Here each of these is one ValueError that
names the file.
"""

import json
import os
from typing import Any

MAX_JSON_BYTES = 100_000_000


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  keys = {}
  for key, value in pairs:
    if key in keys:
      raise ValueError(f"duplicate key {key!r}")
    keys[key] = value
  return keys


def _no_constant(text: str) -> None:
  raise ValueError(f"{text} is not a JSON number")


def parse_object(text: bytes, where: str) -> dict[str, Any]:
  """Parses a JSON object; `where` names its origin in errors.

  Raises:
    ValueError: not UTF-8, not JSON, a duplicate key, NaN or an infinity, too
      deeply nested, or not an object at the top.
  """
  try:
    value = json.loads(
      text.decode("utf-8"),
      object_pairs_hook=_unique,
      parse_constant=_no_constant,
    )
  except RecursionError:
    raise ValueError(f"{where}: too deeply nested JSON") from None
  except ValueError as error:
    raise ValueError(f"{where}: bad JSON: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{where}: a JSON object was expected")
  return value


def read_object(path: str) -> dict[str, Any]:
  """Reads a JSON object from a file of at most 100 MB.

  Raises:
    ValueError: the file is missing, unreadable or too large, or its text is
      refused by `parse_object`.
  """
  try:
    with open(path, "rb") as file:
      if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
      text = file.read()
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}") from None
  return parse_object(text, os.fspath(path))
