"""What every verifier returns."""

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
