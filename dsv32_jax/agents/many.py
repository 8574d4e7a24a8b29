"""Many episodes at a time, into a file that a later run goes on with."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import os
from typing import Any

from dsv32_jax.agents import loop
from dsv32_jax.agents import results


async def run_many(
  episode_ids: Sequence[str],
  run: Callable[[str], Awaitable[loop.EpisodeResult]],
  path: str | os.PathLike,
  *,
  concurrency: int,
  on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
  """Runs the episodes whose ids the file lacks.

  An episode that ended, however it did, has its row and is not run again. One
  that was running when the process died has none, and is.

  Args:
    episode_ids: of all episodes, no two equal.
    run: coroutine function of an id, such as `run_episode` and what it needs.
      Where it raises, no more episodes begin, those that run come to their
      ends and rows, and it is raised then.
    path: of the JSONL file; see `results.ResultsFile`.
    concurrency: episodes at a time.
    on_row: told each new row once it is written, for a progress bar.

  Returns:
    The rows in the order of `episode_ids`.

  Raises:
    ValueError: two ids are equal, concurrency is not positive, or the file is
      in use or broken.
    ExceptionGroup: of what `run` raised.
  """
  if len(set(episode_ids)) < len(episode_ids):
    raise ValueError(f"{len(episode_ids)=} ids are not all different")
  if concurrency < 1:
    raise ValueError(f"{concurrency=} must be positive")
  with results.ResultsFile(path) as file:
    waiting = iter([x for x in episode_ids if x not in file.rows])
    failures: list[Exception] = []

    async def work():
      for episode_id in waiting:  # shared by all workers
        try:
          result = await run(episode_id)
        except Exception as error:
          error.add_note(f"in episode {episode_id}")
          failures.append(error)
        else:
          file.append({**result.row(), "id": episode_id})
          if on_row is not None:
            on_row(file.rows[episode_id])
        if failures:
          return

    async with asyncio.TaskGroup() as group:
      for _ in range(concurrency):
        group.create_task(work())
    if failures:
      raise ExceptionGroup("episodes failed", failures)
    return [file.rows[episode_id] for episode_id in episode_ids]
