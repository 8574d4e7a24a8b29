"""Which sequences run, in which row of the batch, and on which pages."""

from typing import NamedTuple

from dsv32_jax.generation import admission
from dsv32_jax.generation import pages as pages_lib
from dsv32_jax.generation import sequence


class Part(NamedTuple):
  """Tokens of a prompt that a row of a step runs.

  Attributes:
    one: whose.
    start: the first of them, a multiple of a row's tokens.
    end: the one behind the last.
    shared: what is known of the pages before `start`, on the first part of a
      sequence that took them over.
    filled: what is to be known of the pages that the row fills, by the number
      of a page's first token.
  """

  one: sequence.Sequence
  start: int
  end: int
  shared: list[pages_lib.Known]
  filled: dict[int, pages_lib.Known]


class Scheduler:
  """Rows and pages of the sequences that run, and the queue of the others.

  Attributes:
    pages: of the cache.
    rows: the sequence of each row of the batch, or None.
    waiting: sequences without a row, oldest first.
    preemptions: how often a sequence had to give its pages back.
    shared_tokens: tokens of prompts that were taken over, not computed.
  """

  def __init__(
    self,
    pages: pages_lib.Pages,
    *,
    max_batch: int,
    row_tokens: int,
    decoded: int,
  ):
    """Begins with nobody.

    Args:
      pages: of the cache.
      max_batch: rows.
      row_tokens: tokens of a row of a chunk.
      decoded: tokens of a sequence that a step behind its prompt runs.
    """
    self.pages = pages
    self.rows: list[sequence.Sequence | None] = [None] * max_batch
    self.waiting: list[sequence.Sequence] = []
    self.preemptions = self.shared_tokens = 0
    self._row_tokens, self._decoded = row_tokens, decoded

  def running(self) -> list[sequence.Sequence]:
    """Oldest first."""
    running = [one for one in self.rows if one is not None]
    return sorted(running, key=lambda one: one.order)

  def admit(self) -> None:
    """Gives free rows to those that wait, while there are pages for them."""
    if not self.waiting or None not in self.rows:
      return
    running = self.running()
    plan = admission.Admission(
      self.pages, running, row_tokens=self._row_tokens, decoded=self._decoded
    )
    while self.waiting and None in self.rows:
      one = self.waiting[0]
      # Alone it has all pages, and will give others none.
      if running and not plan.has_room(one):
        return
      plan.add(one)
      running.append(one)
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

  def parts(self, most: int) -> list[Part]:
    """Chooses what the rows of a step run, the oldest prompts first.

    A layer writes what all rows add to the cache before any of them reads it:
    a row may follow another of the same prompt, and share pages that another
    row fills in the same step.

    Args:
      most: rows.
    """
    parts: list[Part] = []
    for one in self.running():
      room = (most - len(parts)) * self._row_tokens
      # A younger sequence may have lost its row to an older one.
      if not room or one not in self.rows or one.held >= one.prefill_end:
        continue
      shared = [] if one.pages else self._share(one)
      begin, end = one.held, min(one.held + room, one.prefill_end)
      if not self.ensure(one, end):
        continue
      self.shared_tokens += len(shared) * self.pages.page_size
      for start in range(begin, end, self._row_tokens):
        stop = min(start + self._row_tokens, end)
        filled = self._remember(one, start, stop)
        parts.append(Part(one, start, stop, shared, filled))
        shared = []
    return parts

  def _share(self, one: sequence.Sequence) -> list[pages_lib.Known]:
    """Takes over whole rows that an earlier prompt left, but for the last."""
    size, per_row = self.pages.page_size, self._row_tokens
    usable = min(one.prompt_length, one.prefill_end - 1)
    pages, found = self.pages.match(
      one.tokens, usable // per_row * per_row // size, one.wanted
    )
    whole = len(pages) * size // per_row * per_row // size
    self.pages.give_back(pages[whole:])
    one.pages, one.held = pages[:whole], whole * size
    return found[:whole]

  def _remember(self, one, start: int, end: int) -> dict[int, pages_lib.Known]:
    """Lets later prompts share the pages that these tokens will fill."""
    size, filled = self.pages.page_size, {}
    last = min(end, one.prompt_length) // size
    for place in range(start // size, last):
      begin = place * size
      known = self.pages.remember(
        one.pages[place - 1] if place else -1,
        tuple(one.tokens[begin : begin + size]),
        one.pages[place],
        one.wanted,
      )
      if known is not None:
        filled[begin] = known
    return filled

  def settle(self, part: Part, record: pages_lib.Record) -> None:
    """Notes that a part was run, and what the model chose for its tokens."""
    one, size = part.one, self.pages.page_size
    for place, known in enumerate(part.shared):
      # The rows that fill a page come before those that share it.
      assert known.record is not None
      one.add_record(place * size, known.record)
    one.add_record(part.start, record)
    for begin, known in part.filled.items():
      offset = begin - part.start
      known.record = sequence.cut(record, slice(offset, offset + size))
    one.held = part.end
