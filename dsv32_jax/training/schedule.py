"""Learning rates over steps: linear warm-up, a plateau, a cosine decay."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """Shape of a learning-rate curve; the default is constant at `peak`.

  Attributes:
    peak: learning rate of the plateau.
    warmup_steps: steps that rise linearly; the first has peak/warmup_steps and
      the last of them has peak. 0: no warm-up.
    hold_steps: steps at peak between warm-up and decay.
    decay_steps: steps of the cosine from peak to final; 0: peak for ever.
    final: learning rate after the decay.
  """

  peak: float
  warmup_steps: int = 0
  hold_steps: int = 0
  decay_steps: int = 0
  final: float = 0.0

  def __post_init__(self):
    if self.peak <= 0:
      raise ValueError(f"schedule.peak={self.peak} must be positive")
    if not 0 <= self.final <= self.peak:
      raise ValueError(
        f"schedule.final={self.final} must lie between 0 and peak={self.peak}"
      )
    for name in ("warmup_steps", "hold_steps", "decay_steps"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"schedule.{name}={getattr(self, name)} must not be negative"
        )


def make_schedule(config: ScheduleConfig):
  """Returns a function from a step (int, from 0) to a float32 scalar."""

  def learning_rate(step):
    # int32 differences are exact where float32 steps would not be.
    step = jnp.asarray(step, jnp.int32)
    rising = (step + 1).astype(jnp.float32) / max(config.warmup_steps, 1)
    rate = config.peak * jnp.minimum(rising, 1.0)
    if config.decay_steps:
      into_decay = step - config.warmup_steps - config.hold_steps
      fraction = into_decay.astype(jnp.float32) / config.decay_steps
      cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(fraction, 0.0, 1.0)))
      decayed = config.final + (config.peak - config.final) * cosine
      rate = jnp.where(into_decay > 0, decayed, rate)
    return rate

  return learning_rate
