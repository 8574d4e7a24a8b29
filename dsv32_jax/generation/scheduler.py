"""Which sequences run, in which row of the batch, and on which pages."""

from dsv32_jax.generation import pages as pages_lib
from dsv32_jax.generation import sequence


class Scheduler:
  """Rows and pages of the sequences that run, and the queue of the others.

  Attributes:
    pages: of the cache.
    rows: the sequence of each row of the batch, or None.
    waiting: sequences without a row, oldest first.
    preemptions: how often a sequence had to give its pages back.
  """

  def __init__(
    self, pages: pages_lib.Pages, *, max_batch: int, prefill_chunk: int
  ):
    self.pages = pages
    self.rows: list[sequence.Sequence | None] = [None] * max_batch
    self.waiting: list[sequence.Sequence] = []
    self.preemptions = 0
    self._pages_a_chunk = prefill_chunk // pages.page_size

  def running(self) -> list[sequence.Sequence]:
    """Oldest first."""
    running = [one for one in self.rows if one is not None]
    return sorted(running, key=lambda one: one.order)

  def admit(self) -> None:
    """Gives free rows to those that wait, while there are pages for them."""
    while self.waiting and None in self.rows:
      one = self.waiting[0]
      # With none to spare it would only be thrown out again.
      needed = -(-(one.prefill_end + 1) // self.pages.page_size)
      if self.running() and needed > self.pages.num_free:
        return
      self.rows[self.rows.index(None)] = self.waiting.pop(0)

  def remove(self, one: sequence.Sequence) -> None:
    """Takes a sequence out, wherever it is."""
    if one in self.waiting:
      self.waiting.remove(one)
    else:
      self._release(one)

  def _release(self, one: sequence.Sequence):
    self.rows[self.rows.index(one)] = None
    self.pages.give_back(one.pages)
    one.pages, one.held = [], 0

  def ensure(self, one: sequence.Sequence, length: int) -> bool:
    """Gets pages for `length` tokens, from younger sequences if need be.

    Returns:
      False if the sequence itself was the youngest and waits now.
    """
    needed = -(-length // self.pages.page_size) - len(one.pages)
    while needed > 0:
      taken = self.pages.take(needed)
      if taken is not None:
        one.pages.extend(taken)
        break
      youngest = self.running()[-1]
      self._release(youngest)
      self.waiting.insert(0, youngest)
      self.waiting.sort(key=lambda other: other.order)
      self.preemptions += 1
      if youngest is one:
        return False
    return True

  def share(self, one: sequence.Sequence) -> int:
    """Takes over whole chunks that an earlier prompt left, but for the last.

    Returns:
      How many tokens they hold.
    """
    size, per_chunk = self.pages.page_size, self._pages_a_chunk
    usable = min(one.prompt_length, one.prefill_end - 1)
    found, records = self.pages.match(
      one.tokens, usable // (per_chunk * size) * per_chunk, one.wanted
    )
    whole = len(found) // per_chunk * per_chunk
    self.pages.give_back(found[whole:])
    one.pages, one.held = found[:whole], whole * size
    for place, record in enumerate(records[:whole]):
      one.add_record(place * size, record)
    return one.held

  def remember(
    self, one: sequence.Sequence, start: int, record: pages_lib.Record
  ) -> None:
    """Lets later prompts share the pages that tokens from `start` on filled.

    Args:
      one: whose pages hold them, up to `one.held`.
      start: a multiple of the page size.
      record: what the model chose for the tokens.
    """
    size = self.pages.page_size
    first, last = start // size, min(one.held, one.prompt_length) // size
    for place in range(first, last):
      begin = place * size
      part = slice(begin - start, begin - start + size)
      self.pages.remember(
        one.pages[place - 1] if place else -1,
        tuple(one.tokens[begin : begin + size]),
        one.pages[place],
        sequence.cut(record, part),
      )
