"""How far an episode may go."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
  """Bounds of an episode.

  Attributes:
    turns: replies of the model.
    window: tokens of prompt and reply together.
    turn_tokens: tokens of one reply; one cut off ends the episode.
    context_changes: how often context management may step in.
    seconds: of wall time; what then has been reached is still verified.
    environment_seconds: that an environment may take for one thing.
  """

  turns: int = 200
  window: int = 131_072
  turn_tokens: int = 65_536
  context_changes: int = 100
  seconds: float = 3600.0
  environment_seconds: float = 120.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not getattr(self, field.name) > 0:
        raise ValueError(
          f"{field.name}={getattr(self, field.name)} must be positive"
        )
