"""The sampling half of a run whose answers are episodes in environments.

Each episode has a policy of its own, whose draws follow from the seed, the
task's number and the episode's: an episode goes the same way whatever else
runs, as long as the engine's pages suffice (computing again after a lack of
pages may change last bits) and no limit of wall time is reached.
"""

import asyncio
from collections.abc import Sequence
import dataclasses
import time

import jax
import numpy as np

from dsv32_jax.agents import context
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import protocol
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import local_policy
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import runner as runner_lib
from dsv32_jax.model import config as model_config
from dsv32_jax.model import transformer
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import sampling
from dsv32_jax.rl import trajectory
from dsv32_jax.verifiers import reward as reward_lib

# Seed of tasks and draws, in a run that has single answers as well.
_BESIDE_ANSWERS = 2


async def play(
  config: episode_config.EpisodesConfig,
  policy: policies.Policy,
  task: environments.EpisodeTask,
) -> loop.Episode:
  """Runs one episode of a task."""
  managers = {
    "none": None,
    "summary": context.Summary(max_tokens=config.limits.turn_tokens),
    "discard_75": context.DISCARD_75,
    "discard_all": context.DISCARD_ALL,
  }
  described = {"schemas": None, "signatures": protocol.signatures}
  return await loop.run_episode(
    policy,
    task.make,
    episode_id=task.id,
    limits=config.limits,
    thinking_mode=thinking_mode(config, task),
    system_prompt=config.system_prompt,
    describe=described[config.tool_descriptions],
    manage_context=managers[config.when_full],
  )


def play_all(
  engine: engine_lib.Engine,
  tokenizer: tokenizer_lib.Tokenizer,
  config: episode_config.EpisodesConfig,
  tasks: Sequence[environments.EpisodeTask],
  drawn: Sequence[requests.SamplingParameters],
  *,
  want_routing: bool = False,
  want_selection: bool = False,
) -> list[loop.Episode]:
  """Runs one episode a task, all in an engine's batch.

  Args:
    engine: that replies; it is idle.
    tokenizer: of its model.
    config: of the episodes.
    tasks: of the episodes.
    drawn: how each draws, ids banned that the tokenizer lacks.
    want_routing: as of local_policy.
    want_selection: likewise.
  """
  runner = runner_lib.Runner(engine, max_requests=len(tasks))
  room = asyncio.Semaphore(config.concurrency)

  async def one(task, parameters):
    policy = local_policy.local_policy(
      runner,
      tokenizer,
      parameters,
      want_routing=want_routing,
      want_selection=want_selection,
    )
    async with room:
      return await play(config, policy, task)

  async def everything():
    async with asyncio.TaskGroup() as group:
      running = [
        group.create_task(one(task, parameters))
        for task, parameters in zip(tasks, drawn, strict=True)
      ]
    return [task.result() for task in running]

  try:
    return asyncio.run(everything())
  finally:
    runner.drain()


def thinking_mode(
  config: episode_config.EpisodesConfig, task: environments.EpisodeTask
) -> str:
  """In which of the chat format's modes a task is played."""
  if task.thinking is None:
    return config.thinking_mode
  return "thinking" if task.thinking else "chat"


class _OnMesh:
  """An engine whose steps see the mesh in whatever thread they run."""

  def __init__(self, engine, mesh):
    self._engine, self._mesh = engine, mesh
    self.submit, self.cancel = engine.submit, engine.cancel
    self.stats = engine.stats

  @property
  def has_work(self) -> bool:
    return self._engine.has_work

  def step(self):
    with jax.set_mesh(self._mesh):
      return self._engine.step()


class Sampler(sampling.Drawing):
  """Draws rollouts of episodes; the same for a loop as `sampling.Sampler`."""

  def __init__(
    self,
    config,
    model: transformer.Transformer,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh,
    engine: engine_lib.Engine | None = None,
  ):
    """Builds the engine; `load` gives it the policy.

    Args:
      config: run_config.RlConfig with episodes.
      model: of the policy's shape.
      tokenizer: of the policy.
      mesh: of the policy.
      engine: to share; None: one of its own.
    """
    super().__init__(config, model, tokenizer, engine)
    self._mesh, sizes = mesh, config.sampler.engine
    pages = sizes.pages_for(model.config, model.compute_dtype)
    held = pages * sizes.page_size
    if held < config.episodes.limits.window:
      raise ValueError(
        f"the {held} tokens that sampler.engine has pages for are fewer than"
        f" episodes.limits.window={config.episodes.limits.window}"
      )
    self._seed = config.seed
    if config.tasks:
      # Or the n-th task would be drawn as the n-th problem is.
      self._seed = sampling.seed_of(config.seed, _BESIDE_ANSWERS)
    self._tasks = environments.Tasks(
      config.episodes.environments, split="train", seed=self._seed
    )
    self._banned = banned_ids(config.model, tokenizer)

  def draw(self, number: int) -> sampling.Rollout:
    """Draws the groups of a number."""
    groups, size = self.config.num_episode_groups, self.config.group_size
    first = number * groups
    tasks = [self._tasks.task(first + n) for n in range(groups)]
    repeated = [task for task in tasks for _ in range(size)]
    seeds = [
      sampling.seed_of(self._seed, sampling.TRAIN, first + n, episode)
      for n in range(groups)
      for episode in range(size)
    ]
    before = self.engine.stats()
    start = time.perf_counter()
    episodes = self.play(repeated, seeds)
    drawn = time.perf_counter()
    trajectories = [
      self._trajectory(episode, task)
      for episode, task in zip(episodes, repeated)
    ]
    return sampling.Rollout(
      number=number,
      version=self.version,
      groups=sampling.grouped(trajectories, size),
      rewards=[
        self._rewards(group) for group in sampling.grouped(episodes, size)
      ],
      truncated=float(
        np.mean([one.result.finish == "max_tokens" for one in episodes])
      ),
      shared=sampling.shared(before, self.engine.stats()),
      seconds={"sampling": drawn - start},
      further=_describe(episodes, trajectories),
    )

  def held_out(self) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """As of Drawing."""
    tasks = held_out_tasks(self.config)
    domains = [one.domain for one in tasks]
    return list(zip(domains, self.outcomes(tasks))), {}

  def outcomes(self, tasks: Sequence[environments.EpisodeTask]) -> list[float]:
    """The reward of one episode each, by the seed of the evaluation."""
    seed = self.config.evaluation.seed
    seeds = [
      sampling.seed_of(seed, sampling.HELD_OUT, place, 0)
      for place in range(len(tasks))
    ]
    episodes = self.play(tasks, seeds, record=False)
    return [one.result.reward for one in episodes]

  def play(
    self,
    tasks: Sequence[environments.EpisodeTask],
    seeds: Sequence[int],
    *,
    record: bool = True,
  ) -> list[loop.Episode]:
    """Runs one episode a task, all in the engine's batch.

    Args:
      tasks: of the episodes.
      seeds: of their draws.
      record: whether routing and selection are kept, where they are replayed.
    """
    config, learner = self.config, self.config.learner
    drawn = [
      config.sampler.parameters(temperature=learner.temperature, seed=seed)
      for seed in seeds
    ]
    return play_all(
      _OnMesh(self.engine, self._mesh),
      self.tokenizer,
      config.episodes,
      tasks,
      [dataclasses.replace(x, banned_ids=self._banned) for x in drawn],
      want_routing=record and learner.replays_routing,
      want_selection=record and learner.replay_selection,
    )

  def _trajectory(self, episode, task) -> trajectory.Trajectory:
    # What an environment did wrong teaches nothing.
    crashed = episode.result.finish == "crashed"
    parts = () if crashed else episode.conversation.parts()
    found = trajectory.from_parts(parts, domain=task.domain)
    if self.config.learner.keep_sampling_mask:
      return found
    return dataclasses.replace(
      found,
      parts=tuple(dataclasses.replace(x, kept=None) for x in found.parts),
    )

  def _rewards(self, group) -> list[reward_lib.Reward]:
    """The group's rewards; a crash counts as the mean of the others.

    Its advantage is then zero, and those of the others are as without it.
    """
    penalty = self.config.episodes.length or self.config.reward.length
    values = [
      one.result.reward
      + (penalty.score(one.result.num_written_tokens).value if penalty else 0.0)
      for one in group
    ]
    crashed = [one.result.finish == "crashed" for one in group]
    sound = [value for value, bad in zip(values, crashed) if not bad]
    mean = float(np.mean(sound)) if sound else 0.0
    return [
      reward_lib.Reward(
        value=mean if bad else value,
        outcome=one.result.reward,
        error=one.result.error if bad else "",
      )
      for one, value, bad in zip(group, values, crashed)
    ]


def banned_ids(
  model: model_config.ModelConfig, tokenizer: tokenizer_lib.Tokenizer
) -> tuple[int, ...]:
  """A model's ids that the tokenizer lacks: they have no text."""
  return tuple(range(tokenizer.vocab_size, model.vocab_size))


def held_out_tasks(config) -> list[environments.EpisodeTask]:
  """The tasks of an evaluation: of each environment its share."""
  held_out = environments.Tasks(
    config.episodes.environments, split="held_out", seed=config.evaluation.seed
  )
  return held_out.different(config.held_out_share)


def _describe(episodes, trajectories) -> dict[str, float]:
  results = [one.result for one in episodes]
  return {
    "turns": float(np.mean([one.num_turns for one in results])),
    "calls": float(np.mean([one.num_calls for one in results])),
    "bad_calls": float(np.mean([one.num_bad_calls for one in results])),
    "crashed": float(np.mean([one.finish == "crashed" for one in results])),
    "parts": float(np.mean([len(one.parts) for one in trajectories])),
  }
