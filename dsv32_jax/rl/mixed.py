"""The sampling half of a run that has single answers and episodes at once.

Each rollout holds a fixed number of groups of either, drawn by one engine with
one policy, and the learner sees one batch of trajectories: reasoning, agent and
alignment data in one stage (paper section 3). What a rollout holds follows from
the seed and its number, as of the two samplers that this one joins.
"""

from collections import Counter

import jax

from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.model import transformer
from dsv32_jax.rl import episodes
from dsv32_jax.rl import run_config
from dsv32_jax.rl import sampling
from dsv32_jax.verifiers import reward as reward_lib


class Sampler(sampling.Drawing):
  """Draws rollouts of both; the same for a loop as `sampling.Sampler`."""

  def __init__(
    self,
    config: run_config.RlConfig,
    model: transformer.Transformer,
    tokenizer: tokenizer_lib.Tokenizer,
    rewarder: reward_lib.Rewarder,
    mesh: jax.sharding.Mesh,
  ):
    """Builds the engine; `load` gives it the policy.

    Args:
      config: of the run, with tasks and episodes.
      model: of the policy's shape.
      tokenizer: of the policy.
      rewarder: scores single answers.
      mesh: of the policy.

    Raises:
      ValueError: if the engine's pages cannot hold an episode.
    """
    super().__init__(config, model, tokenizer)
    self._answers = sampling.Sampler(
      config, model, tokenizer, rewarder, self.engine
    )
    self._episodes = episodes.Sampler(
      config, model, tokenizer, mesh, self.engine
    )

  def draw(self, number: int) -> sampling.Rollout:
    """Draws and scores the groups of a number: answers first, then episodes."""
    before = self.engine.stats()
    answers, played = self._answers.draw(number), self._episodes.draw(number)
    cut = answers.truncated * len(answers.groups)
    cut += played.truncated * len(played.groups)
    return sampling.Rollout(
      number=number,
      version=self.version,
      groups=[*answers.groups, *played.groups],
      rewards=[*answers.rewards, *played.rewards],
      truncated=cut / self.config.prompts,
      shared=sampling.shared(before, self.engine.stats()),
      seconds=dict(Counter(answers.seconds) + Counter(played.seconds)),
      further=played.further,
    )

  def held_out(self) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """As of Drawing, of both."""
    answers, further = self._answers.held_out()
    played, more = self._episodes.held_out()
    return answers + played, further | more
