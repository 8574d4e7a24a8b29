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
from dsv32_jax.generation.server import runner as runner_lib
from dsv32_jax.model import transformer
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import sampling
from dsv32_jax.rl import trajectory
from dsv32_jax.verifiers import reward as reward_lib


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
    thinking_mode=config.thinking_mode,
    system_prompt=config.system_prompt,
    describe=described[config.tool_descriptions],
    manage_context=managers[config.when_full],
  )


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


class Sampler:
  """Draws rollouts of episodes; the same for a loop as `sampling.Sampler`."""

  def __init__(
    self,
    config,
    model: transformer.Transformer,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh,
  ):
    """Builds the engine; `load` gives it the policy.

    Args:
      config: run_config.RlConfig with episodes.
      model: of the policy's shape.
      tokenizer: of the policy.
      mesh: of the policy.
    """
    self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
    self._engine = engine_lib.Engine(
      model, config.sampler.engine, eos_id=tokenizer.eos_id
    )
    engine = config.sampler.engine
    pages = engine.pages_for(model.config, model.compute_dtype)
    held = pages * engine.page_size
    if held < config.episodes.limits.window:
      raise ValueError(
        f"the {held} tokens that sampler.engine has pages for are fewer than"
        f" episodes.limits.window={config.episodes.limits.window}"
      )
    self._tasks = environments.Tasks(
      config.episodes.environments, split="train", seed=config.seed
    )
    self._banned = banned_ids(config, tokenizer)
    self._version = -1

  def load(self, model: transformer.Transformer, version: int) -> None:
    """Takes the policy of a version; `model` may change afterwards."""
    weights = self._config.sampler.weights
    self._engine.load(sampling.handed_over(model, weights))
    self._version = version

  def rollout(self, number: int) -> sampling.Rollout:
    """Draws the groups of a number."""
    config = self._config
    evaluation, held_out = config.evaluation, None
    arrived = time.perf_counter()
    if evaluation is not None and number % evaluation.every == 0:
      held_out = self.pass_at_1()
    first, size = number * config.prompts, config.group_size
    tasks = [self._tasks.task(first + n) for n in range(config.prompts)]
    repeated = [task for task in tasks for _ in range(size)]
    seeds = [
      sampling.seed_of(config.seed, sampling.TRAIN, first + n, episode)
      for n in range(config.prompts)
      for episode in range(size)
    ]
    before = self._engine.stats()
    start = time.perf_counter()
    episodes = self.play(repeated, seeds)
    drawn = time.perf_counter()
    trajectories = [
      self._trajectory(episode, task)
      for episode, task in zip(episodes, repeated)
    ]
    return sampling.Rollout(
      number=number,
      version=self._version,
      groups=sampling.grouped(trajectories, size),
      rewards=[
        self._rewards(group) for group in sampling.grouped(episodes, size)
      ],
      truncated=float(
        np.mean([one.result.finish == "max_tokens" for one in episodes])
      ),
      shared=sampling.shared(before, self._engine.stats()),
      seconds={"evaluation": start - arrived, "sampling": drawn - start},
      held_out=held_out,
      further=_describe(episodes, trajectories),
    )

  def pass_at_1(self) -> dict[str, float]:
    """Share of held-out tasks solved, whole and by domain, one try each."""
    config = self._config
    tasks = held_out_tasks(config)
    outcomes = self.outcomes(tasks)
    found = {"pass_at_1": float(np.mean(outcomes))}
    for domain in sorted({one.domain for one in tasks}):
      mine = [x for task, x in zip(tasks, outcomes) if task.domain == domain]
      found[f"pass_at_1_{domain}"] = float(np.mean(mine))
    return found

  def outcomes(self, tasks: Sequence[environments.EpisodeTask]) -> list[float]:
    """The reward of one episode each, by the seed of the evaluation."""
    seed = self._config.evaluation.seed
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
    config, learner = self._config, self._config.learner
    runner = runner_lib.Runner(
      _OnMesh(self._engine, self._mesh), max_requests=len(tasks)
    )
    room = asyncio.Semaphore(config.episodes.concurrency)

    async def one(task, seed):
      parameters = config.sampler.parameters(
        temperature=learner.temperature, seed=seed
      )
      policy = local_policy.local_policy(
        runner,
        self._tokenizer,
        dataclasses.replace(parameters, banned_ids=self._banned),
        want_routing=record and learner.replays_routing,
        want_selection=record and learner.replay_selection,
      )
      async with room:
        return await play(config.episodes, policy, task)

    async def everything():
      async with asyncio.TaskGroup() as group:
        running = [
          group.create_task(one(task, seed)) for task, seed in zip(tasks, seeds)
        ]
      return [task.result() for task in running]

    try:
      return asyncio.run(everything())
    finally:
      runner.drain()

  def _trajectory(self, episode, task) -> trajectory.Trajectory:
    # What an environment did wrong teaches nothing.
    crashed = episode.result.finish == "crashed"
    parts = () if crashed else episode.conversation.parts()
    found = trajectory.from_parts(parts, domain=task.domain)
    if self._config.learner.keep_sampling_mask:
      return found
    return dataclasses.replace(
      found,
      parts=tuple(dataclasses.replace(x, kept=None) for x in found.parts),
    )

  def _rewards(self, group) -> list[reward_lib.Reward]:
    """The group's rewards; a crash counts as the mean of the others.

    Its advantage is then zero, and those of the others are as without it.
    """
    penalty = self._config.reward.length
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


def banned_ids(config, tokenizer) -> tuple[int, ...]:
  """Ids that the tokenizer lacks: a conversation has no text for them."""
  return tuple(range(tokenizer.vocab_size, config.model.vocab_size))


def held_out_tasks(config) -> list[environments.EpisodeTask]:
  """The tasks of an evaluation: of each environment its share."""
  given, evaluation = config.episodes.environments, config.evaluation
  held_out = environments.Tasks(given, split="held_out", seed=evaluation.seed)
  return held_out.different(-(-evaluation.problems // len(given)))


def _describe(episodes, trajectories) -> dict[str, float]:
  results = [one.result for one in episodes]
  return {
    "turns": float(np.mean([one.num_turns for one in results])),
    "calls": float(np.mean([one.num_calls for one in results])),
    "bad_calls": float(np.mean([one.num_bad_calls for one in results])),
    "crashed": float(np.mean([one.finish == "crashed" for one in results])),
    "parts": float(np.mean([len(one.parts) for one in trajectories])),
  }
