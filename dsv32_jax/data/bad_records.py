"""The ledger of records that could not be used.

A record is named by its file and its place in it (line of a text file, from 1;
row of a Parquet or ArrayRecord file, from 1; 0 is the file as a whole). The
same record found again, in a later epoch or after a resume, counts once.
"""

import logging
import threading

_LOGGER = logging.getLogger(__name__)


class BadRecords:
  """Counts bad records against a budget and remembers which they were."""

  def __init__(self, budget: int):
    """Starts an empty ledger.

    Args:
      budget: how many bad records are tolerated; one more raises.

    Raises:
      ValueError: the budget is negative.
    """
    if budget < 0:
      raise ValueError(f"max_bad_records={budget} must not be negative")
    self.budget = budget
    self._reasons: dict[tuple[str, int], str] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._reasons)

  def add(self, file: str, place: int, reason: str):
    """Reports a record that is left out.

    Args:
      file: file name.
      place: line or row, from 1; 0 for the whole file.
      reason: one line.

    Raises:
      ValueError: the budget is exceeded.
    """
    with self._lock:
      if (file, place) in self._reasons:
        return
      self._reasons[file, place] = reason
      number = len(self._reasons)
    message = f"{file}:{place}: {reason}"
    if number > self.budget:
      raise ValueError(
        f"{message} (bad record {number}, max_bad_records={self.budget})"
      )
    _LOGGER.warning(
      "%s (bad record %d of at most %d)", message, number, self.budget
    )

  def entries(self) -> list[tuple[str, int, str]]:
    """Returns (file, place, reason) of every bad record, sorted."""
    with self._lock:
      return sorted((*key, reason) for key, reason in self._reasons.items())

  def restore(self, entries):
    """Adds what an earlier run had found, without reporting it again."""
    with self._lock:
      for file, place, reason in entries:
        self._reasons.setdefault((file, place), reason)
