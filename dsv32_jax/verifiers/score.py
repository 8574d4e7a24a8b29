"""What every verifier returns."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """A reward and, where it could not be computed as meant, the reason.

  Attributes:
    value: the reward.
    error: empty, or one line on what went wrong: a timeout, a crash, an answer
      that could not be read. Errors of this kind cost the sample its reward
      and never the run.
  """

  value: float
  error: str = ""


def weighted_sum(
  scores: Mapping[str, Score], weights: Mapping[str, float]
) -> Score:
  """Adds rewards up: outcome, format, language, length.

  R1 adds the first three with equal weights; V3.2 publishes no weights.

  Raises:
    ValueError: if the two do not name the same rewards.
  """
  if set(scores) != set(weights):
    raise ValueError(
      f"scores={sorted(scores)} and weights={sorted(weights)} differ"
    )
  errors = [f"{name}: {s.error}" for name, s in scores.items() if s.error]
  return Score(
    value=sum(weights[name] * s.value for name, s in scores.items()),
    error="; ".join(errors),
  )
