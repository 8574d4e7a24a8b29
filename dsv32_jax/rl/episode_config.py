"""What episodes a run plays, and how: environments, limits, tools, context."""

import dataclasses
import math
from typing import Literal

from dsv32_jax.agents import limits
from dsv32_jax.agents.synthesis.code import repairs
from dsv32_jax.agents.synthesis.general import domains
from dsv32_jax.agents.synthesis.search import small as searches
from dsv32_jax.verifiers import length as length_lib
from dsv32_jax.verifiers.tasks import arithmetic

# One with a fixed toolset has too many tools for look-ups.
LOOKUP_DOMAINS = tuple(one.name for one in domains.DOMAINS if not one.fixed)

# Of small environments: size and largest that there can be.
_SIZES = {
  "repairs": (range(1, len(repairs.NAMES) + 1), range(2, 1001)),
  "searches": (range(1, 3), range(4, searches.MOST_NAMES + 1)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
  """One kind of environment of a mixture.

  Attributes:
    kind: "calculator" (arithmetic with a tool for each step), "lookups" (small
      general environments, drawn as they are needed), "repairs" (short files of
      which one is wrong), "searches" (a few pages about a made-up world) or
      "general" (those that experiments.synthesize wrote).
    size: numbers in a calculator's expression, files of a repair, steps from
      page to page of a search (1 or 2).
    largest: number in an expression or a file; of a search, how many names of
      each kind there are.
    domains: of the look-ups, or of the general ones to be used; () for all.
    renamed: of the look-ups: whether each environment has words of its own in
      the place of its domain's, so that names cannot be learned by heart.
    path: folder of the synthesis with the general ones.
    weight: share of the tasks, relative to the other kinds.
    name: of its domain, in metrics and for KL weights; "": as its tasks say.
    thinking: whether replies think first; None: as episodes.thinking_mode.
  """

  kind: Literal["calculator", "lookups", "general", "repairs", "searches"]
  size: int = 3
  largest: int = 20
  domains: tuple[str, ...] = ()
  renamed: bool = False
  path: str = ""
  weight: float = 1.0
  name: str = ""
  thinking: bool | None = None

  def __post_init__(self):
    if not 0 < self.weight < math.inf:
      raise ValueError(f"weight={self.weight} of {self.kind} must be positive")
    if (self.kind == "general") != bool(self.path):
      raise ValueError(
        f"path={self.path!r} of kind={self.kind!r}: general environments have"
        " one, and no others"
      )
    if self.kind == "calculator":
      arithmetic.Arithmetic(terms=self.size, largest=self.largest)
    if self.kind in _SIZES:
      sizes, numbers = _SIZES[self.kind]
      if self.size not in sizes or self.largest not in numbers:
        raise ValueError(
          f"size={self.size} of kind={self.kind!r} must be {sizes[0]} to"
          f" {sizes[-1]}, largest={self.largest} {numbers[0]} to {numbers[-1]}"
        )
    if self.renamed and self.kind != "lookups":
      raise ValueError(f"renamed is for kind='lookups', not {self.kind!r}")
    unknown = set(self.domains) - set(LOOKUP_DOMAINS)
    if self.kind == "lookups" and unknown:
      raise ValueError(
        f"domains={self.domains} must be of {', '.join(LOOKUP_DOMAINS)}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesConfig:
  """Episodes in environments, beside single answers or alone.

  Attributes:
    environments: what they are about.
    limits: of an episode; the window holds it whole, as rows do its parts.
    thinking_mode: of the chat format, where an environment does not say.
    system_prompt: before the tools.
    tool_descriptions: "schemas", as the chat format has them, or "signatures",
      names and arguments alone, for small windows.
    when_full: what happens when the window fills up; each time it does, the
      trajectory gets another part, of a summary two.
    concurrency: episodes at a time.
    length: penalty on the tokens written in an episode, in the place of
      reward.length, or None.
  """

  environments: tuple[EnvironmentConfig, ...]
  limits: limits.EpisodeLimits
  thinking_mode: Literal["chat", "thinking"] = "thinking"
  system_prompt: str = ""
  tool_descriptions: Literal["schemas", "signatures"] = "schemas"
  when_full: Literal["none", "summary", "discard_75", "discard_all"] = "none"
  concurrency: int = 256
  length: length_lib.LengthPenalty | None = None

  def __post_init__(self):
    if not self.environments:
      raise ValueError("episodes.environments is empty")
    if self.concurrency < 1:
      raise ValueError(f"episodes.concurrency={self.concurrency} must be >= 1")

  @property
  def most_parts(self) -> int:
    """Parts that a trajectory has at most."""
    each = {"none": 0, "summary": 2}.get(self.when_full, 1)
    return 1 + each * self.limits.context_changes
