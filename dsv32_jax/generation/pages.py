"""Which pages of the cache are free, and which hold the prefix of a prompt.

A page has as many users as sequences that have it in their table. The first
pages of a prompt are remembered by their tokens: a later prompt that begins
the same way takes them over instead of computing them. Remembered pages that
nobody uses are given away last, the least recently used first.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# L layers, N tokens of a page, A experts a token, S selected keys


class Record(NamedTuple):
  """What the model chose for the tokens of a page, where it was kept.

  Attributes:
    experts_LNA: routing, or None.
    selection_LNS: selected keys, or None.
  """

  experts_LNA: np.ndarray | None = None
  selection_LNS: np.ndarray | None = None

  def has(self, wanted: "Wanted") -> bool:
    """Whether all that is wanted was kept."""
    return not (
      (wanted.routing and self.experts_LNA is None)
      or (wanted.selection and self.selection_LNS is None)
    )


class Wanted(NamedTuple):
  """Which parts of a Record a request asks for."""

  routing: bool = False
  selection: bool = False


class _Known(NamedTuple):
  """What is remembered of a page: its place in `_by_prefix`, and choices."""

  prefix: tuple
  record: Record


class Pages:
  """Hands out the numbers of pages."""

  def __init__(self, num_pages: int, page_size: int):
    if num_pages < 1 or page_size < 1:
      raise ValueError(f"{num_pages=} and {page_size=} must be positive")
    self.num_pages, self.page_size = num_pages, page_size
    self._free = list(range(num_pages))[::-1]
    self._users = [0] * num_pages
    # A prefix is (page of what comes before it or -1, serial number of that
    # page's content, tokens); the serial number tells reuses of a page apart.
    self._by_prefix: dict[tuple, int] = {}
    self._known: dict[int, _Known] = {}
    self._serial = [0] * num_pages
    self._unused: collections.OrderedDict[int, None] = collections.OrderedDict()

  @property
  def num_free(self) -> int:
    """Pages that nobody uses, remembered ones included."""
    return len(self._free) + len(self._unused)

  @property
  def num_used(self) -> int:
    return self.num_pages - self.num_free

  def take(self, count: int) -> list[int] | None:
    """Takes pages for one user; None, and nothing taken, if too few."""
    if count > self.num_free:
      return None
    return [self._take_one() for _ in range(count)]

  def _take_one(self) -> int:
    if self._free:
      page = self._free.pop()
    else:
      page, _ = self._unused.popitem(last=False)
      self._forget(page)
    self._users[page] = 1
    self._serial[page] += 1
    return page

  def give_back(self, pages: Sequence[int]) -> None:
    """Ends one use of each page."""
    # The end of a prefix is worth least without its beginning: it goes first.
    for page in reversed(pages):
      assert self._users[page] > 0, page
      self._users[page] -= 1
      if self._users[page]:
        continue
      if page in self._known:
        self._unused[page] = None
      else:
        self._free.append(page)

  def remember(self, before: int, tokens: tuple, page: int, record: Record):
    """Notes that a page in use holds `tokens` behind those of `before`.

    Args:
      before: the page of the tokens before, -1 at the beginning.
      tokens: a page full.
      page: holds them.
      record: what the model chose for them.
    """
    prefix = self._prefix(before, tokens)
    other = self._by_prefix.get(prefix)
    if other is not None:
      # Computed twice at the same time: one copy is enough, and the one with
      # a fuller record serves more.
      if other == page or self._known[other].record.has(
        Wanted(record.experts_LNA is not None, record.selection_LNS is not None)
      ):
        return
      self._forget(other)
      if not self._users[other]:
        del self._unused[other]
        self._free.append(other)
    self._by_prefix[prefix] = page
    self._known[page] = _Known(prefix, record)

  def match(
    self, tokens: Sequence[int], limit: int, wanted: Wanted
  ) -> tuple[list[int], list[Record]]:
    """Finds, and takes, the longest remembered prefix.

    Args:
      tokens: of the prompt.
      limit: pages at most.
      wanted: what the records must have.

    Returns:
      Its pages and their records.
    """
    found, records, before = [], [], -1
    while len(found) < limit:
      start = len(found) * self.page_size
      content = tuple(tokens[start : start + self.page_size])
      page = self._by_prefix.get(self._prefix(before, content))
      if page is None or not self._known[page].record.has(wanted):
        break
      found.append(page)
      records.append(self._known[page].record)
      before = page
    for page in found:
      self._unused.pop(page, None)
      self._users[page] += 1
    return found, records

  def forget_all(self) -> None:
    """Forgets every prefix, as when the weights change."""
    for page in list(self._known):
      self._forget(page)
    self._free.extend(self._unused)
    self._unused.clear()

  def _prefix(self, before: int, tokens: tuple) -> tuple:
    serial = self._serial[before] if before >= 0 else 0
    return before, serial, tokens

  def _forget(self, page: int) -> None:
    known = self._known.pop(page)
    del self._by_prefix[known.prefix]
