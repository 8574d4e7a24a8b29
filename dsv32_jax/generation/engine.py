"""Continuous batching: requests join and leave the running batch at any step.

A step takes one chunk of the oldest prompt that is not yet in the cache, and
one token of every sequence whose prompt is, or that one and its draft by the
multi-token prediction module. Pages are taken as tokens come; when none is left
the youngest sequence gives its pages back, waits, and is computed again later:
what it has drawn stays drawn.

Work follows the pages in use: a step runs at the smallest compiled number of
pages that its longest sequence needs, and `warm_up` compiles them all. A row's
arithmetic depends neither on other rows nor on that number, so a request gives
the same tokens and log-probabilities whoever shares the batch with it. Prefixes
are shared by whole chunks, so that a prompt is cut the same way with sharing
and without. (Computing again after a lack of pages may change last bits:
prompts and answers then go through the same chunks.)
"""

from collections.abc import Callable, Sequence
import itertools

import numpy as np

from dsv32_jax.generation import pages as pages_lib
from dsv32_jax.generation import programs
from dsv32_jax.generation import requests as requests_lib
from dsv32_jax.generation import sampler
from dsv32_jax.generation import scheduler
from dsv32_jax.generation import sequence

EngineConfig = programs.EngineConfig

# B sequences, T tokens, M pages of a sequence


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
    self._scheduler = scheduler.Scheduler(
      pages_lib.Pages(self._programs.num_pages, config.page_size),
      max_batch=config.max_batch,
      prefill_chunk=config.prefill_chunk,
    )
    self._eos_id, self._detokenize = eos_id, detokenize
    self._seeds = np.random.default_rng(config.seed)
    self._submitted = 0
    self._live: dict[str, sequence.Sequence] = {}
    self._cancelled: list[sequence.Sequence] = []
    self._counts = dict(
      prompt_tokens=0,
      shared_tokens=0,
      drawn_tokens=0,
      drafted_tokens=0,
      accepted_tokens=0,
    )
    # Tokens of a sequence that a step runs when its prompt is in the cache.
    self._decoded = 2 if config.speculate else 1

  def warm_up(self) -> None:
    """Compiles every program that requests can ask for."""
    for num_pages in self.config.compiled_page_counts:
      for batch, length, is_chunk in (
        (1, self.config.prefill_chunk, True),
        (self.config.max_batch, self._decoded, False),
      ):
        self._call(
          [None] * batch,
          np.zeros((batch, length), np.int32),
          np.full((batch, length), -1, np.int32),
          np.zeros((batch,), np.int32),
          num_pages=num_pages,
          is_chunk=is_chunk,
        )

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
      requests_lib.collect(request_id, request.prompt_ids, events[request_id])
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

  def _call(
    self, sequences, tokens_BT, next_BT, count_B, *, is_chunk, num_pages=None
  ):
    """Runs a step; the n-th row is of the n-th sequence, None runs nothing.

    The longest sequence decides what `num_pages` is, where it is not given.
    """
    batch = len(sequences)
    live = [one for one in sequences if one is not None]
    if num_pages is None:
      needed = max(len(one.pages) for one in live)
      num_pages = min(
        n for n in self.config.compiled_page_counts if n >= needed
      )
    table_BM = np.zeros((batch, num_pages), np.int32)
    length_B = np.zeros((batch,), np.int32)
    for row, one in enumerate(sequences):
      if one is not None:
        table_BM[row, : len(one.pages)] = one.pages
        length_B[row] = one.held
    rows = sampler.rows(
      [one and one.request.sampling for one in sequences],
      [one.seed if one else 0 for one in sequences],
      [one.num_drawn if one else 0 for one in sequences],
      self._vocab_size,
    )
    call = programs.Call(tokens_BT, next_BT, length_B, count_B, table_BM, rows)
    return self._programs(call, is_chunk=is_chunk)

  def _prefill(self) -> list[requests_lib.TokenEvent]:
    ready = [
      one for one in self._scheduler.running() if one.held < one.prefill_end
    ]
    if not ready:
      return []
    one, chunk = ready[0], self.config.prefill_chunk
    if not one.pages:
      self._counts["shared_tokens"] += self._scheduler.share(one)
    start, end = one.held, min(one.held + chunk, one.prefill_end)
    if not self._scheduler.ensure(one, end):
      return []
    count = end - start
    tokens_BT = np.zeros((1, chunk), np.int32)
    tokens_BT[0, :count] = one.tokens[start:end]
    next_BT = np.full((1, chunk), -1, np.int32)
    known = one.tokens[start + 1 : end + 1]
    next_BT[0, : len(known)] = known
    result = self._call(
      [one], tokens_BT, next_BT, np.asarray([count], np.int32), is_chunk=True
    )
    self._counts["prompt_tokens"] += count
    record = sequence.record_of(one, result, 0, slice(count))
    one.add_record(start, record)
    one.held = end
    self._scheduler.remember(one, start, record)
    if one.held < one.prefill_end or one.num_drawn:
      return []
    fetched = sequence.fetch(one, result, 0, 0, self._vocab_size)
    self._take_draft(one, result, 0)
    return [self._accept(one, *fetched)]

  def _decode(self) -> list[requests_lib.TokenEvent]:
    rows = self._scheduler.rows
    for one in self._scheduler.running():
      if one.is_ready and one in rows:
        self._scheduler.ensure(one, len(one.tokens) + one.may_draft)
    sequences = [one if one and one.is_ready else None for one in rows]
    if not any(sequences):
      return []
    shape = (len(sequences), self._decoded)
    tokens_BT = np.zeros(shape, np.int32)
    count_B = np.zeros(shape[:1], np.int32)
    for row, one in enumerate(sequences):
      if one:
        run = [one.tokens[-1], one.draft] if one.may_draft else one.tokens[-1:]
        tokens_BT[row, : len(run)], count_B[row] = run, len(run)
    result = self._call(
      sequences,
      tokens_BT,
      np.full(shape, -1, np.int32),
      count_B,
      is_chunk=False,
    )
    events = []
    for row, one in enumerate(sequences):
      if one:
        events.extend(self._advance(one, result, row))
    return events

  def _advance(self, one, result, row) -> list[requests_lib.TokenEvent]:
    """Takes the token drawn, and the one behind it if the draft was right.

    Each is the model's own draw behind the tokens before it, whatever was
    drafted: a draft decides how many are drawn at once, never which.
    """
    fetched = sequence.fetch(one, result, row, 0, self._vocab_size)
    is_right = None
    if one.may_draft:
      is_right = one.draft == fetched[0]
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
      events.append(self._accept(one, *fetched, None if turn else is_right))
      if events[-1].finish_reason is not None:
        break
    return events

  def _take_draft(self, one, result, row):
    if result.draft_B is not None:
      one.draft = int(np.asarray(result.draft_B)[row])

  def _accept(
    self, one, token, logprob, kept, is_as_drafted=None
  ) -> requests_lib.TokenEvent:
    """Appends a drawn token; ends the request where it ends."""
    one.tokens.append(token)
    self._counts["drawn_tokens"] += 1
    joined = sequence.join(one.pending)
    one.pending = []
    reason = sequence.finish_reason(one, self._eos_id, self._detokenize)
    if reason is not None:
      self._leave(one)
    return requests_lib.TokenEvent(
      request_id=one.request_id,
      token_id=token,
      logprob=logprob,
      finish_reason=reason,
      kept_ids=kept,
      experts_LNA=joined.experts_LNA,
      selection_LNS=joined.selection_LNS,
      is_as_drafted=is_as_drafted,
    )
