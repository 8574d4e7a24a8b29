"""A JSONL file of results by id that survives being killed at any time.

A row is appended with one write. What a kill cut off is a last line without an
end, which the next opening drops; its id counts as not done. One process at a
time holds the file.
"""

from collections.abc import Mapping
import fcntl
import json
import os
import pathlib
from typing import Any


class ResultsFile:
  """Rows that each have an "id", no id twice; a context manager.

  Attributes:
    path: of the file.
    rows: by id, in the order of the file.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the file, or makes it, and reads what is there.

    Raises:
      ValueError: another process has it open, or it holds lines that are not
        rows; the message names the line.
    """
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    self._file = os.open(self.path, flags, 0o644)
    try:
      self._lock()
      self.rows = self._read()
    except BaseException:
      os.close(self._file)
      raise

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes a row; it is there whole, or not at all if this raises.

    Raises:
      ValueError: its id is there already or no string, or it has no JSON form.
      OSError: the disk is full, or the like.
    """
    row_id = row.get("id")
    if not isinstance(row_id, str) or row_id in self.rows:
      raise ValueError(f"{self.path}: {row_id=} is no new id")
    try:
      line = json.dumps(dict(row), ensure_ascii=True, allow_nan=False)
    except (TypeError, RecursionError) as error:
      raise ValueError(f"{self.path}: {row_id=}: {error}") from error
    size, waiting = os.fstat(self._file).st_size, line.encode("ascii") + b"\n"
    try:
      while waiting:
        waiting = waiting[os.write(self._file, waiting) :]
    except OSError:
      os.ftruncate(self._file, size)
      raise
    self.rows[row_id] = json.loads(line)

  def close(self) -> None:
    """Closes the file, which another process may open then."""
    if self._file is not None:
      os.close(self._file)
      self._file = None

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def _lock(self):
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"{self.path}: another process writes it") from None

  def _read(self) -> dict[str, dict[str, Any]]:
    content = self.path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
      os.ftruncate(self._file, whole)
    rows = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
      try:
        row = json.loads(line)
        row_id = row["id"]
      except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{self.path}:{number}: no row: {error}") from error
      if not isinstance(row_id, str) or row_id in rows:
        raise ValueError(f"{self.path}:{number}: {row_id=} is no new id")
      rows[row_id] = row
    return rows
