"""What is distilled from whom."""

import dataclasses
import math

from dsv32_jax.generation import programs
from dsv32_jax.generation import requests
from dsv32_jax.rl import episode_config
from dsv32_jax.verifiers.tasks import mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialistConfig:
  """A model that is good at something, and what it is asked.

  Attributes:
    name: of the specialist, and of its files.
    checkpoint: folder of its checkpoints; the newest is taken.
    tasks: what it is asked, where an answer is a single one.
    episodes: what it plays; exactly one of the two.
    thinking: whether it thinks first: the mode it was trained in.
    problems: different ones of each task or environment, of the training
      split.
    weight: share of the mixed examples, relative to the others'.
  """

  name: str
  checkpoint: str
  problems: int
  tasks: tuple[mixture.TaskConfig, ...] = ()
  episodes: episode_config.EpisodesConfig | None = None
  thinking: bool = False
  weight: float = 1.0

  def __post_init__(self):
    if not self.name or not self.name.replace("_", "").isalnum():
      raise ValueError(f"name={self.name!r} must be of letters, digits and _")
    if self.problems < 1:
      raise ValueError(f"{self.name}: problems={self.problems} ask nothing")
    if bool(self.tasks) == (self.episodes is not None):
      raise ValueError(
        f"{self.name}: tasks={self.tasks} and episodes: exactly one of them is"
        " to be given"
      )
    if not 0 < self.weight < math.inf:
      raise ValueError(f"{self.name}: weight={self.weight} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
  """Specialists, how their answers are drawn, and what is kept.

  Attributes:
    specialists: whose answers are taken.
    tokenizer: file of the tokenizer they share.
    engine: sizes of the generation engine.
    answers: to each problem.
    max_tokens: of an answer, or of each reply of an episode.
    temperature: of the draws.
    top_p: likewise.
    most_of_a_problem: accepted answers that stay, the shortest.
    examples: of the mixture; None for as many as its weights allow.
    everything: take all that is chosen, whatever the weights; a specialist of
      whose answers none was accepted then gives nothing.
    scoring_workers: processes that score answers.
    scoring_seconds: an answer's score may take.
    seed: of problems, draws and the order of the mixture.
  """

  specialists: tuple[SpecialistConfig, ...]
  tokenizer: str
  engine: programs.EngineConfig
  max_tokens: int
  answers: int = 4
  temperature: float = 1.0
  top_p: float = 1.0
  most_of_a_problem: int = 1
  examples: int | None = None
  everything: bool = False
  scoring_workers: int = 2
  scoring_seconds: float = 10.0
  seed: int = 0

  def __post_init__(self):
    names = [one.name for one in self.specialists]
    if not names or len(set(names)) < len(names):
      raise ValueError(f"specialists={names} must be there, each name once")
    for name in ("answers", "most_of_a_problem", "examples"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be positive")
    if self.everything and self.examples is not None:
      raise ValueError(
        f"examples={self.examples} and everything=True exclude each other"
      )
    # Raises where a parameter is out of range.
    self.parameters(seed=0)

  def parameters(self, *, seed: int) -> requests.SamplingParameters:
    """How one answer is drawn."""
    return requests.SamplingParameters(
      max_tokens=self.max_tokens,
      temperature=self.temperature,
      top_p=self.top_p,
      seed=seed,
    )
