"""Solved episodes and problems: supervised seeds for reinforcement learning.

Each is in the mode that its task is asked in: with thinking before the answer
or before every call, or without any. An episode's solution is played call by
call, and what the verifier accepts and the cold start's filter keeps becomes an
example. It is rendered as the sampler will see it and tokenised by the same
rules, once.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
import itertools
import json
import pathlib
from typing import Any

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import episodes
from dsv32_jax.verifiers import tasks as tasks_lib

# By the mode of the chat format.
_MODES = {
  mode.thinking_mode: mode
  for mode in (cold_start.TOOL_USE, cold_start.REASONING_WITH_TOOLS)
}


def problem_pieces(
  problem: tasks_lib.Problem, *, thinking: bool
) -> list[dict[str, Any]]:
  """A solved problem as `data.pieces` reads it.

  Args:
    problem: with its solution.
    thinking: whether the reasoning is learnt before the answer, or left out.
  """
  return cold_start.pieces(
    problem.messages(thinking=thinking), "thinking" if thinking else "chat"
  )


def shown_tasks(
  configs: Sequence[episode_config.EnvironmentConfig], seed: int
) -> Iterator[environments.EpisodeTask]:
  """Yields training tasks whose solutions a fine-tuning before GRPO sees.

  They are drawn apart from those of a GRPO run of episodes with that seed,
  which would otherwise begin with what is known by heart; few different tasks
  may still be in both.

  Args:
    configs: of the environments.
    seed: of the GRPO run.
  """
  drawn = environments.Tasks(configs, split="train", seed=seed + 1)
  return map(drawn.task, itertools.count())


def solved(
  config: episode_config.EpisodesConfig,
  tasks: Iterable[environments.EpisodeTask],
) -> Iterator[tuple[loop.EpisodeResult, str]]:
  """Plays the solution of each task; yields also the mode it is played in.

  Raises:
    ValueError: if a solution is no example.
  """
  for task in tasks:
    mode = _MODES[episodes.thinking_mode(config, task)]
    thinks = mode.thinking_mode == "thinking"
    script = policies.replies(
      *(
        policies.call(
          one.name,
          json.dumps(one.arguments, ensure_ascii=False),
          reasoning=one.thought if thinks else "",
        )
        for one in task.solve()
      )
    )
    policy = policies.ScriptedPolicy(script)
    result = asyncio.run(episodes.play(config, policy, task)).result
    reason = cold_start.reason_against(result.row(), mode, 1.0)
    if reason:
      raise ValueError(f"the solution of task {task.id} is no seed: {reason}")
    yield result, mode.thinking_mode


def write(
  config: episode_config.EpisodesConfig,
  tasks: Iterable[environments.EpisodeTask],
  path: pathlib.Path,
) -> None:
  """Writes examples as data sources with pieces_field "pieces" read them."""
  rows = (
    {
      "id": result.id,
      "pieces": json.dumps(cold_start.pieces(result.messages, mode)),
    }
    for result, mode in solved(config, tasks)
  )
  tables.write_jsonl(path, rows)


def texts(
  config: episode_config.EpisodesConfig, *, seed: int, count: int
) -> Iterator[str]:
  """Yields the text of some solved tasks, for a tokenizer to train on."""
  tasks = environments.Tasks(config.environments, split="train", seed=seed)
  numbered = map(tasks.task, itertools.count())
  for result, mode in solved(config, itertools.islice(numbered, count)):
    pieces = cold_start.pieces(result.messages, mode)
    # Where neighbouring texts meet is no border of tokens.
    for is_text, group in itertools.groupby(pieces, lambda x: "text" in x):
      if is_text:
        yield "".join(piece["text"] for piece in group)
