"""Episodes on more than one machine: Ray actors behind `many.run_many`.

The driver keeps the results file and hands out ids; a worker is a process of
the cluster that plays several episodes at a time. A worker that dies is started
again, and what it was playing is played again: only whole results reach the
file. Needs the extra `ray`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import os
from typing import Any

import ray

from dsv32_jax.agents import loop
from dsv32_jax.agents import many

Run = Callable[[str], Awaitable[loop.EpisodeResult]]


class _Worker:
  """What an actor holds: one function, made once."""

  def __init__(self, make_run: Callable[[], Run]):
    self._run = make_run()

  async def play(self, episode_id: str) -> loop.EpisodeResult:
    return await self._run(episode_id)


def run_many(
  episode_ids: Sequence[str],
  make_run: Callable[[], Run],
  path: str | os.PathLike,
  *,
  workers: int,
  concurrency: int = 1,
  cpus: float = 1.0,
  tries: int = 3,
  on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
  """Runs the episodes whose ids the file lacks, on the connected cluster.

  Args:
    episode_ids: of all episodes.
    make_run: called once in every worker; gives the coroutine function that
      plays an episode, with its policy and environments. It goes there by
      pickle, so it imports by name or holds what pickles.
    path: of the JSONL file, on the driver's machine.
    workers: processes, wherever the cluster has room for them.
    concurrency: episodes at a time of one worker.
    cpus: that the cluster counts for a worker.
    tries: of an episode whose worker dies.
    on_row: told each new row.

  Returns:
    The rows in the order of `episode_ids`.

  Raises:
    ValueError: a number is not positive, no cluster is connected, or as
      `many.run_many`.
    ExceptionGroup: of what `make_run` or its function raised, or of workers
      that died too often.
  """
  for name, value in (
    ("workers", workers),
    ("concurrency", concurrency),
    ("tries", tries),
  ):
    if value < 1:
      raise ValueError(f"{name}={value} must be positive")
  if not ray.is_initialized():
    raise ValueError("no Ray cluster is connected: call ray.init first")
  actor = ray.remote(_Worker).options(
    num_cpus=cpus,
    max_concurrency=concurrency,
    max_restarts=tries - 1,
    max_task_retries=tries - 1,
  )
  actors = [actor.remote(make_run) for _ in range(workers)]
  try:
    return asyncio.run(
      _run_many(episode_ids, actors, path, concurrency, on_row)
    )
  finally:
    for one in actors:
      ray.kill(one)


async def _run_many(episode_ids, actors, path, concurrency, on_row):
  free = asyncio.Queue()
  for _ in range(concurrency):
    for one in actors:
      free.put_nowait(one)

  async def run(episode_id: str) -> loop.EpisodeResult:
    one = await free.get()
    try:
      return await one.play.remote(episode_id)
    finally:
      free.put_nowait(one)

  return await many.run_many(
    episode_ids,
    run,
    path,
    concurrency=concurrency * len(actors),
    on_row=on_row,
  )
