"""The reward of an answer to a generated problem, computed where it may fail.

Outcome, format, language and length are added up. Each answer is scored in a
worker process: one that hangs or crashes its scorer costs that sample a zero
with its reason, and nobody else anything.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import language as language_lib
from dsv32_jax.verifiers import length as length_lib
from dsv32_jax.verifiers import score as score_lib
from dsv32_jax.verifiers import workers
from dsv32_jax.verifiers.tasks import problem as problem_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
  """What counts beside the outcome, whose weight is 1. The weights are ours.

  Attributes:
    thinking: whether answers think first, where their task does not say.
    format_weight: of the shape of the response.
    language: a code such as "en", or None: any.
    language_weight: of the share of words in that language.
    length: penalty on long answers, or None.
  """

  thinking: bool = False
  format_weight: float = 0.0
  language: str | None = None
  language_weight: float = 0.0
  length: length_lib.LengthPenalty | None = None

  def __post_init__(self):
    for name in ("format_weight", "language_weight"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f"reward.{name}={getattr(self, name)} must be >= 0")
    if self.language is not None:
      language_lib.language_share("", self.language)
    elif self.language_weight:
      raise ValueError(
        f"reward.language_weight={self.language_weight} without reward.language"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What is scored.

  Attributes:
    problem: that was posed.
    response: text that the policy wrote.
    num_tokens: of it.
    thinking: whether it was to think first; None: as the config says.
  """

  problem: problem_lib.Problem
  response: str
  num_tokens: int
  thinking: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
  """What an answer earns.

  Attributes:
    value: the reward, finite.
    outcome: the verifier's part of it, the only one in pass@1.
    error: empty, or why the scorer did not do its work.
  """

  value: float
  outcome: float
  error: str = ""


def score(answer: Answer, config: RewardConfig) -> Reward:
  """Scores one answer; the scorer that `Rewarder` runs by default."""
  thinking = config.thinking if answer.thinking is None else answer.thinking
  scores = {"outcome": answer.problem.score(answer.response)}
  weights = {"outcome": 1.0}
  if config.format_weight:
    weights["format"] = config.format_weight
    scores["format"] = format_lib.format_score(
      answer.response, thinking=thinking, boxed=answer.problem.boxed
    )
  if config.language is not None and config.language_weight:
    weights["language"] = config.language_weight
    prose = answer.response
    if thinking:
      prose = format_lib.thinking_part(prose)
    scores["language"] = language_lib.language_score(prose, config.language)
  if config.length is not None:
    weights["length"] = 1.0
    scores["length"] = config.length.score(answer.num_tokens)
  total = score_lib.weighted_sum(scores, weights)
  return Reward(value=total.value, outcome=scores["outcome"].value)


class Rewarder:
  """Scores many answers at a time in guarded processes; use as a context."""

  def __init__(
    self,
    config: RewardConfig,
    *,
    num_workers: int = 2,
    timeout_seconds: float = 10.0,
    function: Callable[[Answer, RewardConfig], Reward] = score,
  ):
    """Starts nothing yet.

    Args:
      config: of the reward.
      num_workers: processes at most.
      timeout_seconds: for an answer.
      function: the scorer, found by name from a new process.

    Raises:
      ValueError: if a number is not positive.
    """
    self._pool = workers.WorkerPool(
      functools.partial(function, config=config),
      num_workers=num_workers,
      timeout_seconds=timeout_seconds,
    )

  def score(self, answers: Sequence[Answer]) -> list[Reward]:
    """One reward each, in order; zeros with their reason where it failed."""
    return [_checked(outcome) for outcome in self._pool.map(answers)]

  def close(self) -> None:
    """Ends the workers."""
    self._pool.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


def _checked(outcome: workers.Outcome) -> Reward:
  reward, error = outcome.value, outcome.error
  if not error and not isinstance(reward, Reward):
    error = f"no reward but {str(reward)[:100]!r}"
  if not error and not math.isfinite(reward.value + reward.outcome):
    error = f"reward {reward.value} is not finite"
  return Reward(value=0.0, outcome=0.0, error=error) if error else reward
