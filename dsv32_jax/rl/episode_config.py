"""How episodes are played: environments, limits, tools, context."""

import dataclasses
from typing import Literal

from dsv32_jax.agents import context
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tools
from dsv32_jax.rl import environments


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesConfig:
  """Episodes in environments, in the place of single answers.

  Attributes:
    environments: what they are about.
    limits: of an episode; the window holds it whole, as rows do its parts.
    thinking_mode: of the chat format.
    system_prompt: before the tools.
    tool_descriptions: "schemas", as the chat format has them, or "signatures",
      names and arguments alone, for small windows.
    when_full: what happens when the window fills up; each time it does, the
      trajectory gets another part, of a summary two.
    concurrency: episodes at a time.
  """

  environments: tuple[environments.EnvironmentConfig, ...]
  limits: loop.EpisodeLimits
  thinking_mode: Literal["chat", "thinking"] = "thinking"
  system_prompt: str = ""
  tool_descriptions: Literal["schemas", "signatures"] = "schemas"
  when_full: Literal["none", "summary", "discard_75", "discard_all"] = "none"
  concurrency: int = 256

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

  def manager(self) -> loop.ContextManager | None:
    """What makes room in a conversation."""
    managers = {
      "none": None,
      "summary": context.Summary(max_tokens=self.limits.turn_tokens),
      "discard_75": context.DISCARD_75,
      "discard_all": context.DISCARD_ALL,
    }
    return managers[self.when_full]

  async def play(
    self, policy: policies.Policy, task: environments.EpisodeTask
  ) -> loop.Episode:
    """Runs one episode of a task."""
    described = {"schemas": None, "signatures": tools.signatures}
    return await loop.run_episode(
      policy,
      task.make,
      episode_id=task.id,
      limits=self.limits,
      thinking_mode=self.thinking_mode,
      system_prompt=self.system_prompt,
      describe=described[self.tool_descriptions],
      manage_context=self.manager(),
    )
