"""Which of those that wait may begin: pages are promised, not only counted.

A sequence takes its pages as its prompt is computed, over several steps. Until
then they are free, and would let others in that throw it, or are thrown, out
again soon after. So what those before it still lack is set aside first. Pages
that a prompt shares with them it does not lack.
"""

from collections.abc import Iterable

from dsv32_jax.generation import pages as pages_lib
from dsv32_jax.generation import sequence

# The place of a page within a prompt: what comes before it, and its tokens.
_Place = tuple[int, tuple]


class Admission:
  """Counts what the running sequences lack, as of one moment."""

  def __init__(
    self,
    pages: pages_lib.Pages,
    running: Iterable[sequence.Sequence],
    *,
    row_tokens: int,
    decoded: int,
  ):
    """Sets aside what running sequences lack.

    Args:
      pages: of the cache.
      running: oldest first.
      row_tokens: tokens of a row of a chunk; whole ones are shared.
      decoded: tokens of a sequence that a step behind its prompt runs.
    """
    self._pages, self._row_tokens = pages, row_tokens
    self._decoded = decoded
    self._promised = 0
    # Pages to come, numbered below -1; what their records will have; and
    # remembered pages without a user that are promised to somebody.
    self._planned: dict[_Place, int] = {}
    self._wanted: dict[int, pages_lib.Wanted] = {}
    self._revived: set[int] = set()
    for one in running:
      self.add(one)

  def has_room(self, one: sequence.Sequence) -> bool:
    """Whether its prompt and what follows at once get pages, if it begins."""
    return self._promised + self._lacking(one) <= self._pages.num_free

  def add(self, one: sequence.Sequence) -> None:
    """Promises a sequence what it lacks."""
    self._promised += self._lacking(one)
    if one.pages:
      place, before = len(one.pages), one.pages[-1]
    else:
      shared = self._shared(one)
      place, before = len(shared), shared[-1] if shared else -1
      self._revived.update(page for page in shared if page >= 0)
    size = self._pages.page_size
    for number in range(place, one.prompt_length // size):
      key = before, _content(one, number, size)
      before = self._planned.setdefault(key, -2 - len(self._planned))
      known = self._wanted.get(before)
      if known is None or one.wanted.has(known):
        self._wanted[before] = one.wanted

  def _lacking(self, one: sequence.Sequence) -> int:
    """Pages that it has yet to take from the free ones."""
    sampling = one.request.sampling
    # The last token that is drawn is never run.
    length = min(
      one.prefill_end + self._decoded,
      one.prompt_length + sampling.max_tokens - 1,
    )
    needed = -(-length // self._pages.page_size)
    if one.pages:
      return max(0, needed - len(one.pages))
    return needed - sum(map(self._is_shared, self._shared(one)))

  def _is_shared(self, page: int) -> bool:
    """Whether somebody holds a page or will; a user of its own costs one."""
    return page < 0 or page in self._revived or self._pages.has_user(page)

  def _shared(self, one: sequence.Sequence) -> list[int]:
    """Pages of whole rows of its prompt that are there, or to come."""
    size, found, before = self._pages.page_size, [], -1
    usable = min(one.prompt_length, one.prefill_end - 1)
    for number in range(usable // self._row_tokens * self._row_tokens // size):
      page = self._next(before, _content(one, number, size), one.wanted)
      if page is None:
        break
      found.append(page)
      before = page
    whole = len(found) * size // self._row_tokens * self._row_tokens // size
    return found[:whole]

  def _next(self, before: int, content: tuple, wanted) -> int | None:
    if before >= -1:
      page = self._pages.find(before, content, wanted)
      if page is not None:
        return page
    number = self._planned.get((before, content))
    if number is not None and self._wanted[number].has(wanted):
      return number
    return None


def _content(one: sequence.Sequence, number: int, size: int) -> tuple:
  return tuple(one.tokens[number * size : (number + 1) * size])
