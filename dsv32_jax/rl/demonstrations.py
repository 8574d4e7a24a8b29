"""Solved episodes: supervised seeds for reinforcement learning.

A task's solution is played call by call, and what the verifier accepts and the
cold start's filter keeps becomes an example. It is rendered as the sampler will
see it and tokenised by the same rules, once.
"""

import asyncio
from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import json
import pathlib

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import episodes

# Solutions hold no thinking.
_MODE = cold_start.TOOL_USE


def solved(
  config: episode_config.EpisodesConfig,
  tasks: Iterable[environments.EpisodeTask],
) -> Iterator[loop.EpisodeResult]:
  """Plays the solution of each task.

  Raises:
    ValueError: if episodes think, or a solution is no example.
  """
  if config.thinking_mode != _MODE.thinking_mode:
    raise ValueError(
      f"episodes.thinking_mode={config.thinking_mode!r}: solutions hold no"
      " thinking"
    )
  for task in tasks:
    script = policies.replies(
      *(
        policies.call(name, json.dumps(arguments, ensure_ascii=False))
        for name, arguments in task.solve()
      )
    )
    policy = policies.ScriptedPolicy(script)
    result = asyncio.run(episodes.play(config, policy, task)).result
    reason = cold_start.reason_against(result.row(), _MODE, 1.0)
    if reason:
      raise ValueError(f"the solution of task {task.id} is no seed: {reason}")
    yield result


def write(
  config: episode_config.EpisodesConfig,
  tasks: Iterable[environments.EpisodeTask],
  path: pathlib.Path,
) -> None:
  """Writes examples as data sources with pieces_field "pieces" read them."""
  rows = (
    {
      "id": result.id,
      "pieces": json.dumps(
        cold_start.pieces(result.messages, config.thinking_mode)
      ),
    }
    for result in solved(config, tasks)
  )
  tables.write_jsonl(path, rows)


def texts(
  config: episode_config.EpisodesConfig, *, seed: int, count: int
) -> Iterator[str]:
  """Yields the text of some solved tasks, for a tokenizer to train on."""
  config = dataclasses.replace(config, thinking_mode=_MODE.thinking_mode)
  tasks = environments.Tasks(config.environments, split="train", seed=seed)
  numbered = map(tasks.task, itertools.count())
  for result in solved(config, itertools.islice(numbered, count)):
    for piece in cold_start.pieces(result.messages, config.thinking_mode):
      if "text" in piece:
        yield piece["text"]
