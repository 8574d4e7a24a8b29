"""Continuous batching: requests join and leave the running batch at any step.

A step takes a chunk of tokens of the prompts that are not yet in the cache, the
oldest first, and one token of every sequence whose prompt is, or that one and
its draft by the multi-token prediction module. Pages are taken as tokens come;
when none is left the youngest sequence gives its pages back, waits, and is
computed again later: what it has drawn stays drawn.

A chunk has a fixed number of rows. Many short prompts take a row each, a long
one takes them all, one behind the other.

Work follows the pages in use: a step runs at the smallest compiled number of
pages that its longest sequence needs, and `warm_up` compiles them all. A row's
arithmetic depends neither on other rows nor on that number, so a request gives
the same tokens and log-probabilities whoever shares the batch with it. Prefixes
are shared by whole rows, so that a prompt is cut the same way with sharing and
without. (Computing again after a lack of pages may change last bits: prompts
and answers then go through the same rows.)
"""

from collections.abc import Callable, Sequence
import itertools

import numpy as np

from dsv32_jax.generation import batch as batch_lib
from dsv32_jax.generation import pages as pages_lib
from dsv32_jax.generation import programs
from dsv32_jax.generation import requests as requests_lib
from dsv32_jax.generation import scheduler
from dsv32_jax.generation import sequence
from dsv32_jax.generation import sizes

EngineConfig = sizes.EngineConfig


class Engine:
  """Generates for many requests at once."""

  def __init__(
    self,
    model,
    config: EngineConfig,
    *,
    eos_id: int | None = None,
    detokenize: Callable[[list[int]], str] | None = None,
  ):
    """Copies the model's layers out of their stack and allocates the cache.

    Args:
      model: Transformer with stacked layers.
      config: sizes.
      eos_id: token that ends an answer, or None.
      detokenize: token ids to text, needed for stop strings.
    """
    self.config = config
    self._programs = programs.Programs(model, config)
    self._vocab_size = model.config.vocab_size
    # Tokens of a sequence that a step runs when its prompt is in the cache.
    self._decoded = 2 if config.speculate else 1
    self._scheduler = scheduler.Scheduler(
      pages_lib.Pages(self._programs.num_pages, config.page_size),
      max_batch=config.max_batch,
      row_tokens=config.row_tokens,
      decoded=self._decoded,
    )
    self._eos_id, self._detokenize = eos_id, detokenize
    self._seeds = np.random.default_rng(config.seed)
    self._submitted = 0
    self._live: dict[str, sequence.Sequence] = {}
    self._cancelled: list[sequence.Sequence] = []
    self._counts = dict(
      prompt_tokens=0,
      drawn_tokens=0,
      drafted_tokens=0,
      accepted_tokens=0,
    )

  def warm_up(self) -> None:
    """Compiles every program that requests can ask for."""
    for num_pages in self.config.compiled_page_counts:
      for is_chunk in (True, False):
        self._run(self._batch(is_chunk), is_chunk, [num_pages])

  def submit(self, request: requests_lib.Request) -> str:
    """Queues a request.

    Returns:
      Its id.

    Raises:
      ValueError: on a prompt that is empty, has an unknown token or does not
        fit with its answer, and on parameters that cannot be served.
    """
    self._check(request)
    request_id = request.request_id
    if request_id is None:
      request_id = self._free_id()
    if self._in_use(request_id):
      raise ValueError(f"{request_id=} is in use")
    seed = request.sampling.seed
    if seed is None:
      seed = int(self._seeds.integers(1 << 63))
    one = sequence.Sequence(
      request=request,
      request_id=request_id,
      order=self._submitted,
      seed=seed,
      tokens=[int(token) for token in request.prompt_ids],
    )
    self._submitted += 1
    self._live[request_id] = one
    self._scheduler.waiting.append(one)
    return request_id

  def _in_use(self, request_id: str) -> bool:
    """Until its last event is given out, also that of a cancelled request."""
    cancelled = (one.request_id for one in self._cancelled)
    return request_id in self._live or request_id in cancelled

  def _free_id(self) -> str:
    numbers_from = itertools.count(self._submitted)
    names = (f"request-{number}" for number in numbers_from)
    return next(name for name in names if not self._in_use(name))

  def _check(self, request):
    requests_lib.check(
      request,
      vocab_size=self._vocab_size,
      max_length=self.config.max_length,
      room=self._programs.num_pages * self.config.page_size,
      has_text=self._detokenize is not None,
      most_adjusted=self._programs.most_adjusted,
    )

  def cancel(self, request_id: str) -> None:
    """Ends a request; its last event comes with the next step.

    Raises:
      ValueError: if no such request is live.
    """
    if request_id not in self._live:
      raise ValueError(f"{request_id=} is not live")
    one = self._live[request_id]
    self._leave(one)
    self._cancelled.append(one)

  @property
  def has_work(self) -> bool:
    return bool(self._live or self._cancelled)

  def stats(self) -> dict[str, int]:
    """Counts: pages, requests and tokens so far."""
    plan = self._scheduler
    return dict(
      pages_used=plan.pages.num_used,
      pages_free=plan.pages.num_free,
      running=len(plan.running()),
      waiting=len(plan.waiting),
      preemptions=plan.preemptions,
      shared_tokens=plan.shared_tokens,
      **self._counts,
    )

  def load(self, model) -> None:
    """Takes another model's weights; what is compiled serves on.

    Raises:
      ValueError: if that model has another shape, or requests are live.
    """
    if self.has_work:
      raise ValueError(f"{len(self._live)} requests are live")
    self._programs.load(model)
    self._scheduler.pages.forget_all()

  def generate(
    self, requests: Sequence[requests_lib.Request]
  ) -> list[requests_lib.Completion]:
    """Runs requests to their ends.

    Raises:
      ValueError: as `submit`, or if other requests are live.
    """
    if self.has_work:
      raise ValueError(f"{len(self._live)} other requests are live")
    for request in requests:
      self._check(request)
    named = [r.request_id for r in requests if r.request_id is not None]
    if len(set(named)) < len(named):
      raise ValueError(f"request ids are there twice: {sorted(named)}")
    ids = [self.submit(request) for request in requests]
    events = {request_id: [] for request_id in ids}
    while self.has_work:
      for event in self.step():
        events[event.request_id].append(event)
    return [
      requests_lib.collect(request_id, request, events[request_id])
      for request_id, request in zip(ids, requests)
    ]

  def step(self) -> list[requests_lib.TokenEvent]:
    """Runs one chunk and one token of each sequence that is ready for it."""
    events = [
      requests_lib.TokenEvent(
        request_id=one.request_id,
        token_id=None,
        logprob=0.0,
        finish_reason="cancelled",
      )
      for one in self._cancelled
    ]
    self._cancelled.clear()
    self._scheduler.admit()
    events.extend(self._prefill())
    events.extend(self._decode())
    return events

  def _leave(self, one: sequence.Sequence):
    """Ends a sequence, wherever it is."""
    del self._live[one.request_id]
    self._scheduler.remove(one)

  def _batch(self, is_chunk: bool) -> batch_lib.Batch:
    """Makes an empty one of one of the two shapes that are compiled."""
    if is_chunk:
      return batch_lib.Batch(self.config.rows, self.config.row_tokens)
    return batch_lib.Batch(self.config.max_batch, self._decoded)

  def _run(self, batch, is_chunk, page_counts=None) -> programs.Result:
    """Runs a step, with as few pages a sequence as the longest allows."""
    if page_counts is None:
      page_counts = self.config.compiled_page_counts
    call = batch.call(
      page_counts, self._vocab_size, self._programs.most_adjusted
    )
    return self._programs(call, is_chunk=is_chunk)

  def _prefill(self) -> list[requests_lib.TokenEvent]:
    parts = self._scheduler.parts(self.config.rows)
    if not parts:
      return []
    batch = self._batch(is_chunk=True)
    for row, part in enumerate(parts):
      batch.put_part(row, part)
    result = self._run(batch, is_chunk=True)
    events = []
    for row, part in enumerate(parts):
      one, count = part.one, part.end - part.start
      self._counts["prompt_tokens"] += count
      record = sequence.record_of(one, result, row, slice(count))
      self._scheduler.settle(part, record)
      if one.held == one.prefill_end and not one.num_drawn:
        fetched = sequence.fetch(one, result, row, 0, self._vocab_size)
        self._take_draft(one, result, row)
        events.append(self._accept(one, fetched))
    return events

  def _decode(self) -> list[requests_lib.TokenEvent]:
    rows = self._scheduler.rows
    for one in self._scheduler.running():
      if one.is_ready and one in rows:
        self._scheduler.ensure(one, len(one.tokens) + one.may_draft)
    ready = [(row, one) for row, one in enumerate(rows) if one and one.is_ready]
    if not ready:
      return []
    batch = self._batch(is_chunk=False)
    for row, one in ready:
      drafted = [one.draft] if one.may_draft else []
      batch.put(row, one, [one.tokens[-1], *drafted], one.held)
    result = self._run(batch, is_chunk=False)
    return [
      event for row, one in ready for event in self._advance(one, result, row)
    ]

  def _advance(self, one, result, row) -> list[requests_lib.TokenEvent]:
    """Takes the token drawn, and the one behind it if the draft was right.

    Each is the model's own draw behind the tokens before it, whatever was
    drafted: a draft decides how many are drawn at once, never which.
    """
    fetched = sequence.fetch(one, result, row, 0, self._vocab_size)
    is_right = None
    if one.may_draft:
      is_right = one.draft == fetched.token
      self._counts["drafted_tokens"] += 1
      self._counts["accepted_tokens"] += is_right
    self._take_draft(one, result, row)
    events = []
    for turn in range(2 if is_right else 1):
      record = sequence.record_of(one, result, row, slice(turn, turn + 1))
      one.add_record(one.held, record)
      one.held += 1
      if turn:
        fetched = sequence.fetch(one, result, row, turn, self._vocab_size)
      events.append(self._accept(one, fetched, None if turn else is_right))
      if events[-1].finish_reason is not None:
        break
    return events

  def _take_draft(self, one, result, row):
    if result.draft_B is not None:
      one.draft = int(np.asarray(result.draft_B)[row])

  def _accept(
    self, one, draw: sequence.Draw, is_as_drafted=None
  ) -> requests_lib.TokenEvent:
    """Appends a drawn token; ends the request where it ends."""
    one.append(draw.token)
    self._counts["drawn_tokens"] += 1
    joined = sequence.join(one.pending)
    one.pending = []
    reason = sequence.finish_reason(one, self._eos_id, self._detokenize)
    if reason is not None:
      self._leave(one)
    return requests_lib.TokenEvent(
      request_id=one.request_id,
      token_id=draw.token,
      logprob=draw.logprob,
      finish_reason=reason,
      kept_ids=draw.kept,
      experts_LNA=joined.experts_LNA,
      selection_LNS=joined.selection_LNS,
      is_as_drafted=is_as_drafted,
      top_logprobs=draw.top,
    )
