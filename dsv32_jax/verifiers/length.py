"""A penalty on long answers. The paper has one and publishes no form."""

import dataclasses
import math

from dsv32_jax.verifiers import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthPenalty:
  """Ours: nothing up to `free_tokens`, then linear to `weight`.

  Attributes:
    free_tokens: tokens that cost nothing.
    max_tokens: tokens from which on the penalty is whole.
    weight: the whole penalty.
  """

  free_tokens: int
  max_tokens: int
  weight: float = 1.0

  def __post_init__(self):
    if not 0 <= self.free_tokens < self.max_tokens:
      raise ValueError(
        f"free_tokens={self.free_tokens} must be at least 0 and below"
        f" max_tokens={self.max_tokens}"
      )
    if not 0 <= self.weight < math.inf:
      raise ValueError(f"weight={self.weight} must be finite, not negative")

  def score(self, num_tokens: int) -> score.Score:
    """Returns a reward of at most 0 for a response of so many tokens."""
    beyond = num_tokens - self.free_tokens
    share = beyond / (self.max_tokens - self.free_tokens)
    return score.Score(value=-self.weight * min(max(share, 0.0), 1.0))
