"""A request on its way through the engine, and what is recorded of it."""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np

from dsv32_jax.generation import pages as pages_lib
from dsv32_jax.generation import requests
from dsv32_jax.generation import sampler

# B sequences, T tokens, N tokens, L layers, A experts a token, S selected keys


@dataclasses.dataclass(eq=False)
class Sequence:
  """A request on its way.

  Attributes:
    order: number of its submission.
    tokens: prompt and drawn tokens.
    held: how many of them the cache has.
    pages: its pages.
    draft: a guess at the token behind the last one, or None.
    recorded: tokens whose records are in `pending` or in past events.
    pending: Record since the last event.
    times: how often each token was drawn, where that is penalised.
  """

  request: requests.Request
  request_id: str
  order: int
  seed: int
  tokens: list[int]
  held: int = 0
  pages: list[int] = dataclasses.field(default_factory=list)
  draft: int | None = None
  recorded: int = 0
  pending: list[pages_lib.Record] = dataclasses.field(default_factory=list)
  times: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def prompt_length(self) -> int:
    return len(self.request.prompt_ids)

  @property
  def num_drawn(self) -> int:
    return len(self.tokens) - self.prompt_length

  @property
  def is_ready(self) -> bool:
    """Whether all but the last drawn token is in the cache."""
    return self.num_drawn > 0 and self.held == len(self.tokens) - 1

  @property
  def may_draft(self) -> bool:
    """Whether there is a draft, and room for a token behind the next one."""
    room = self.request.sampling.max_tokens - self.num_drawn
    return self.draft is not None and room > 1 and self.request.may_draft

  @property
  def prefill_end(self) -> int:
    """Tokens to run in chunks: the last drawn one goes with the batch."""
    return len(self.tokens) - (1 if self.num_drawn else 0)

  def append(self, token: int) -> None:
    """Takes a token that was drawn."""
    self.tokens.append(token)
    if self.request.sampling.penalizes:
      self.times[token] += 1

  @property
  def bias(self) -> dict[int, float]:
    """What is added to the logits of the next draw, by token."""
    sampling = self.request.sampling
    bias = dict(sampling.logit_bias)
    for token, count in self.times.items():
      penalty = sampling.presence_penalty + sampling.frequency_penalty * count
      bias[token] = bias.get(token, 0.0) - penalty
    return bias

  @property
  def allowed(self) -> np.ndarray | None:
    """The tokens that the request's constraint allows next; None: all."""
    if self.request.constraint is None:
      return None
    return self.request.constraint.allowed(self.tokens[self.prompt_length :])

  @property
  def wanted(self) -> pages_lib.Wanted:
    return pages_lib.Wanted(
      self.request.want_routing, self.request.want_selection
    )

  def add_record(self, start: int, record: pages_lib.Record):
    """Keeps what is new and wanted of the record of tokens from `start` on."""
    # A shared page may have been recorded for a request that wanted more.
    record = pages_lib.Record(
      record.experts_LNA if self.wanted.routing else None,
      record.selection_LNS if self.wanted.selection else None,
    )
    parts = [part for part in record if part is not None]
    if not parts:
      return
    end = start + parts[0].shape[1]
    if end > self.recorded:
      fresh = slice(max(self.recorded - start, 0), None)
      self.pending.append(cut(record, fresh))
      self.recorded = end


def finish_reason(one: Sequence, eos_id, detokenize) -> str | None:
  """Says why a sequence ends with its last token, or None if it goes on."""
  sampling = one.request.sampling
  if one.tokens[-1] == eos_id and not sampling.ignore_eos:
    return "stop"
  if sampling.stop:
    # A token is at least one byte, so a stop string ends in the last
    # token of these or is not new.
    window = max(len(text.encode()) for text in sampling.stop) + 4
    drawn = one.tokens[one.prompt_length :][-window:]
    text = detokenize(drawn)
    if any(stop in text for stop in sampling.stop):
      return "stop"
  return "length" if one.num_drawn >= sampling.max_tokens else None


class Draw(NamedTuple):
  """What a step drew for a sequence; see `requests.TokenEvent`."""

  token: int
  logprob: float
  kept: np.ndarray | None
  top: tuple[tuple[int, float], ...]


def fetch(one, result, row, turn, vocab_size) -> Draw:
  """Brings a draw of a row to the host."""
  place, drawn = (row, turn), result.drawn
  kept, top = None, ()
  if one.request.truncates:
    kept = sampler.kept_ids(np.asarray(drawn.kept_BW)[place], vocab_size)
  if count := one.request.sampling.top_logprobs:
    ids = np.asarray(drawn.top_id_BU)[place][:count].tolist()
    logprobs = np.asarray(drawn.top_logprob_BU)[place][:count].tolist()
    top = tuple(x for x in zip(ids, logprobs) if x[1] > -np.inf)
  token = int(np.asarray(drawn.token_B)[place])
  return Draw(token, float(np.asarray(drawn.logprob_B)[place]), kept, top)


def record_of(one, result, row, part: slice) -> pages_lib.Record:
  """Brings to the host what the request wants of a part of its tokens."""

  def fetched(array_LBTX, wanted):
    if not wanted or array_LBTX is None:
      return None
    return np.asarray(array_LBTX)[:, row, part]

  return pages_lib.Record(
    fetched(result.experts_LBTA, one.wanted.routing),
    fetched(result.selection_LBTS, one.wanted.selection),
  )


def cut(record, part: slice) -> pages_lib.Record:
  """Takes some of the tokens of a record."""
  return pages_lib.Record(
    *(None if array is None else array[:, part] for array in record)
  )


def join(records) -> pages_lib.Record:
  """Joins records of consecutive tokens."""

  def joined(arrays):
    arrays = [array for array in arrays if array is not None]
    return np.concatenate(arrays, axis=1) if arrays else None

  columns = zip(*records) if records else ((), ())
  return pages_lib.Record(*(joined(column) for column in columns))
