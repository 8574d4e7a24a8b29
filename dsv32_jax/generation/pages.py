"""Which pages of the cache are free, and which hold the prefix of a prompt.

A page has as many users as sequences that have it in their table. The first
pages of a prompt are remembered by their tokens: a later prompt that begins
the same way takes them over instead of computing them. Remembered pages that
nobody uses are given away last, the least recently used first.
"""

import collections
from collections.abc import Sequence
import dataclasses
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


class Wanted(NamedTuple):
  """Which parts of a Record a request asks for."""

  routing: bool = False
  selection: bool = False

  def has(self, other: "Wanted") -> bool:
    """Whether all that the other asks for is in this."""
    return self.routing >= other.routing and self.selection >= other.selection


@dataclasses.dataclass(eq=False)
class Known:
  """What is remembered of a page.

  Attributes:
    prefix: the page's place in `_by_prefix`.
    wanted: what the record has, once it is there.
    record: what the model chose for the tokens; None until the step that fills
      the page has run.
  """

  prefix: tuple
  wanted: Wanted
  record: Record | None = None


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
    self._known: dict[int, Known] = {}
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

  def remember(
    self, before: int, tokens: tuple, page: int, wanted: Wanted
  ) -> Known | None:
    """Notes that a page in use holds `tokens` behind those of `before`.

    Args:
      before: the page of the tokens before, -1 at the beginning.
      tokens: a page full.
      page: holds them, or will when the next step has run.
      wanted: what its record will have.

    Returns:
      Where the record is to be put; None where another page is remembered.
    """
    prefix = self._prefix(before, tokens)
    other = self._by_prefix.get(prefix)
    if other is not None:
      # Computed twice: one copy is enough, and the one with a fuller record
      # serves more.
      if other == page or self._known[other].wanted.has(wanted):
        return None
      self._forget(other)
      if not self._users[other]:
        del self._unused[other]
        self._free.append(other)
    self._by_prefix[prefix] = page
    self._known[page] = Known(prefix, wanted)
    return self._known[page]

  def match(
    self, tokens: Sequence[int], limit: int, wanted: Wanted
  ) -> tuple[list[int], list[Known]]:
    """Finds, and takes, the longest remembered prefix.

    Args:
      tokens: of the prompt.
      limit: pages at most.
      wanted: what the records must have.

    Returns:
      Its pages and what is known of them.
    """
    pages, found, before = [], [], -1
    while len(pages) < limit:
      start = len(pages) * self.page_size
      content = tuple(tokens[start : start + self.page_size])
      page = self.find(before, content, wanted)
      if page is None:
        break
      pages.append(page)
      found.append(self._known[page])
      before = page
    for page in pages:
      self._unused.pop(page, None)
      self._users[page] += 1
    return pages, found

  def find(self, before: int, tokens: tuple, wanted: Wanted) -> int | None:
    """Returns the remembered page of `tokens` behind those of `before`."""
    page = self._by_prefix.get(self._prefix(before, tokens))
    if page is None or not self._known[page].wanted.has(wanted):
      return None
    return page

  def has_user(self, page: int) -> bool:
    """Whether a page is in a sequence's table."""
    return self._users[page] > 0

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
