"""What is asked of a generation engine, and what it answers."""

from collections.abc import Mapping, Sequence
import dataclasses
import numbers
from typing import Protocol

import numpy as np

# N tokens, L layers, A experts a token, S selected keys, W words of 32 tokens

FINISH_REASONS = ("stop", "length", "cancelled")
# Likeliest tokens that can be told of each draw.
MOST_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParameters:
  """How the tokens of one request are drawn, and when it ends.

  Penalties and biases come first, then bans, then temperature, then top-k,
  top-p and min-p on what the one before left, each renormalised.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_p: keeps the most likely tokens that hold this much probability, the
      one that crosses it included.
    top_k: keeps this many of the most likely tokens; 0: all.
    min_p: keeps tokens at least this much as likely as the likeliest.
    max_tokens: tokens drawn at most.
    stop: strings that end the answer where they appear in its text.
    seed: of the draws; None: one that the engine picks.
    banned_ids: tokens that are never drawn.
    ignore_eos: whether the answer goes on behind the end-of-sequence token.
    presence_penalty: taken from the logit of each token drawn before.
    frequency_penalty: likewise, as often as it was drawn.
    logit_bias: added to the logits of tokens, by their ids; a mapping, or its
      items.
    top_logprobs: how many of the likeliest tokens to tell with each draw.
  """

  max_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0
  stop: tuple[str, ...] = ()
  seed: int | None = None
  banned_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
  top_logprobs: int = 0

  def __post_init__(self):
    _require_integer("max_tokens", self.max_tokens, 1)
    _require_integer("top_k", self.top_k, 0)
    if self.top_k >= 1 << 31:
      raise ValueError(f"top_k={self.top_k} must be below 2 ** 31")
    _require_integer("top_logprobs", self.top_logprobs, 0)
    if self.top_logprobs > MOST_TOP_LOGPROBS:
      raise ValueError(
        f"top_logprobs={self.top_logprobs} must be at most {MOST_TOP_LOGPROBS}"
      )
    for name in ("temperature", "top_p", "min_p"):
      _require_number(name, getattr(self, name))
    for name in ("presence_penalty", "frequency_penalty"):
      _require_number(name, getattr(self, name), 2)
    items = tuple(dict(self.logit_bias).items())
    object.__setattr__(self, "logit_bias", items)
    for token, bias in items:
      _require_integer("logit_bias", token, 0)
      _require_number(f"logit_bias of {token}", bias, 100)
    # Beyond these, float32 logits overflow or all but one vanish.
    if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
      raise ValueError(
        f"temperature={self.temperature} must be 0 or between 1e-6 and 1e6"
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p={self.min_p} must be between 0 and 1")
    if isinstance(self.stop, str):
      raise ValueError(f"stop={self.stop!r} must be a tuple of strings")
    object.__setattr__(self, "stop", tuple(self.stop))
    for text in self.stop:
      if not isinstance(text, str) or not text:
        raise ValueError(f"stop={self.stop!r} must hold non-empty strings")
      if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"stop={text!r} is no Unicode text")
    if self.seed is not None:
      _require_integer("seed", self.seed, 0)
      if self.seed >= 1 << 63:
        raise ValueError(f"seed={self.seed} must be below 2 ** 63")
    object.__setattr__(self, "banned_ids", tuple(self.banned_ids))
    for token in self.banned_ids:
      _require_integer("banned_ids", token, 0)

  @property
  def penalizes(self) -> bool:
    """Whether what was drawn changes what will be."""
    return bool(self.presence_penalty or self.frequency_penalty)

  @property
  def adjusts(self) -> bool:
    """Whether logits are changed by more than a temperature and bans."""
    return self.penalizes or any(bias for _, bias in self.logit_bias)

  @property
  def truncates(self) -> bool:
    """Whether some tokens may be left out of the distribution drawn from."""
    return bool(
      self.temperature == 0
      or self.top_p < 1
      or self.top_k
      or self.min_p
      or self.banned_ids
    )


class Constraint(Protocol):
  """Decides, token by token, which ones may come; for one request alone.

  Attributes:
    failure: why it could not be kept to the end, or None.
  """

  failure: str | None

  def allowed(self, drawn: Sequence[int]) -> np.ndarray | None:
    """Says which tokens may follow.

    Args:
      drawn: the answer so far; more tokens of the same answer each time.

    Returns:
      uint32 words allowed_W, bit i % 32 of word i // 32 for token i, at least
      one of them set; None: all.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt to continue.

  Attributes:
    prompt_ids: at least one token.
    sampling: how to draw.
    request_id: of the caller's choice, or None for the engine's.
    want_selection: record the keys that every token attended to.
    want_routing: record the experts that every token went through.
    constraint: says which tokens may be drawn; banned ones only if it allows no
      others.
  """

  prompt_ids: Sequence[int]
  sampling: SamplingParameters
  request_id: str | None = None
  want_selection: bool = False
  want_routing: bool = False
  constraint: Constraint | None = None

  @property
  def truncates(self) -> bool:
    """Whether some tokens may be left out of a distribution drawn from."""
    return self.sampling.truncates or self.constraint is not None

  @property
  def may_draft(self) -> bool:
    """Whether a token changes nothing of the next one's distribution."""
    return not self.sampling.penalizes and self.constraint is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent:
  """A token that was drawn, or the end of a request without one.

  Attributes:
    request_id: whose.
    token_id: drawn, or None for a cancelled request.
    logprob: natural logarithm of the token's probability in the distribution
      it was drawn from, after all that `SamplingParameters` does to it.
    finish_reason: None, or one of FINISH_REASONS on the last event.
    kept_ids: sorted int32 ids that could have been drawn; None: all.
    experts_LNA: uint8 or int32 routing of the tokens that were run through
      the model since the last event (the prompt, on the first), if wanted.
    selection_LNS: int32 selected keys of the same tokens, padded with -1.
    is_as_drafted: whether the token had been drafted; None: no draft was there.
    top_logprobs: (id, logprob) of the likeliest tokens of the same
      distribution, as many as asked for and possible.
  """

  request_id: str
  token_id: int | None
  logprob: float
  finish_reason: str | None = None
  kept_ids: np.ndarray | None = None
  experts_LNA: np.ndarray | None = None
  selection_LNS: np.ndarray | None = None
  is_as_drafted: bool | None = None
  top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """A finished request.

  Attributes:
    request_id: whose.
    prompt_ids: as given.
    token_ids: drawn tokens; an end-of-sequence token is the last of them.
    logprobs: of each, in the distribution it was drawn from.
    finish_reason: one of FINISH_REASONS.
    kept: for each drawn token the sorted ids that could have been drawn, or
      None for all.
    experts_LNA: routing of prompt and answer but for the last token, which
      was only drawn; None if not wanted.
    selection_LNS: selected keys of the same tokens; None if not wanted.
    num_drafted: tokens that a draft was there for.
    num_accepted: those of them that were drawn as drafted.
    adjusted: whether logits were changed in ways that nothing here tells, so
      that no learner can find the log-probabilities again.
  """

  request_id: str
  prompt_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: str
  kept: tuple[np.ndarray | None, ...]
  experts_LNA: np.ndarray | None = None
  selection_LNS: np.ndarray | None = None
  num_drafted: int = 0
  num_accepted: int = 0
  adjusted: bool = False


def collect(
  request_id: str, request: Request, events: Sequence[TokenEvent]
) -> Completion:
  """Joins the events of one request; the last one carries the reason."""
  drawn = [event for event in events if event.token_id is not None]
  drafted = [e for e in events if e.is_as_drafted is not None]

  def joined(name):
    parts = [getattr(event, name) for event in events]
    parts = [part for part in parts if part is not None]
    return np.concatenate(parts, axis=1) if parts else None

  return Completion(
    request_id=request_id,
    prompt_ids=tuple(request.prompt_ids),
    token_ids=tuple(event.token_id for event in drawn),
    logprobs=tuple(event.logprob for event in drawn),
    finish_reason=events[-1].finish_reason,
    kept=tuple(event.kept_ids for event in drawn),
    experts_LNA=joined("experts_LNA"),
    selection_LNS=joined("selection_LNS"),
    num_drafted=len(drafted),
    num_accepted=sum(event.is_as_drafted for event in drafted),
    adjusted=request.sampling.adjusts,
  )


def _require_integer(name: str, value, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(f"{name}={value!r} must be an integer")
  if value < least:
    raise ValueError(f"{name}={value} must be at least {least}")


def _require_number(name: str, value, most: float | None = None) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(f"{name}={value!r} must be a number")
  if most is not None and not -most <= value <= most:
    raise ValueError(f"{name}={value} must be between -{most} and {most}")


def check(
  request: Request,
  *,
  vocab_size: int,
  max_length: int,
  room: int,
  has_text: bool,
  most_adjusted: int | None = None,
) -> None:
  """Raises ValueError for a request that an engine cannot serve.

  Args:
    request: what is asked.
    vocab_size: ids that the model has.
    max_length: tokens of a sequence at most.
    room: tokens that the whole cache holds.
    has_text: whether the engine turns tokens into text.
    most_adjusted: tokens whose logits penalties and biases can change; None:
      all.
  """
  ids, sampling = request.prompt_ids, request.sampling
  if not isinstance(request.request_id, str | None):
    raise ValueError(f"request_id={request.request_id!r} must be a string")
  if not len(ids):
    raise ValueError(f"{len(ids)=}: the prompt is empty")
  for name, values in (
    ("prompt_ids", ids),
    ("banned_ids", sampling.banned_ids),
    ("logit_bias", dict(sampling.logit_bias)),
  ):
    for token in values:
      if isinstance(token, bool) or not isinstance(token, numbers.Integral):
        raise ValueError(f"{name}: {token=} must be an integer")
      if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: {token=} is outside {vocab_size=}")
  if len(set(sampling.banned_ids)) == vocab_size:
    raise ValueError("banned_ids holds every token")
  total = len(ids) + sampling.max_tokens
  if total > max_length:
    raise ValueError(
      f"{len(ids)=} and max_tokens={sampling.max_tokens} exceed {max_length=}"
    )
  if total > room:
    raise ValueError(f"{total=} tokens exceed the cache's {room=}")
  changed = len(sampling.logit_bias)
  changed += sampling.max_tokens if sampling.penalizes else 0
  if most_adjusted is not None and min(changed, vocab_size) > most_adjusted:
    raise ValueError(
      f"max_tokens={sampling.max_tokens} with penalties, and a logit_bias of"
      f" {len(sampling.logit_bias)}, may change more logits than"
      f" {most_adjusted=}"
    )
  if sampling.stop and not has_text:
    raise ValueError(f"stop={sampling.stop!r} needs a detokenizer")
