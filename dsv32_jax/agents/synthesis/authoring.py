"""What pipelines share that a model drives: its config, and filling a folder.

A model works on one candidate in one episode, with tools, and hands in what it
made by calling one of them. What is handed in is checked by programs; the
model is told what is wrong and may go on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any

from dsv32_jax.agents import loop
from dsv32_jax.agents import results
from dsv32_jax.agents import tables
from dsv32_jax.agents.synthesis.general import campaign as folders

CANDIDATES_FILE = "candidates.jsonl"
# A server may have moved.
FREE_FIELDS = (
  *("num_tasks", "max_candidates", "concurrency", "num_helpful"),
  "base_url",
)
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuthoringConfig:
  """Who writes, and how much.

  Attributes:
    base_url: of an OpenAI-compatible server, such as experiments.serve.
    model: its name there.
    num_tasks: after as many no candidate is begun.
    max_candidates: after as many it ends, however many tasks there are.
    concurrency: candidates at a time.
    turns: replies of the model on one candidate.
    seconds: of wall time on one candidate.
  """

  base_url: str = ""
  model: str = ""
  num_tasks: int = 100
  max_candidates: int = 1000
  concurrency: int = 4
  turns: int = 100
  seconds: float = 3600.0

  def __post_init__(self):
    for name in ("num_tasks", "max_candidates", "concurrency", "turns"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if not self.seconds > 0:
      raise ValueError(f"seconds={self.seconds} must be positive")

  def limits(self) -> loop.EpisodeLimits:
    """Returns the bounds of an episode."""
    return loop.EpisodeLimits(
      turns=self.turns,
      seconds=self.seconds,
      environment_seconds=min(600.0, self.seconds),
    )


def fill(
  config: AuthoringConfig,
  workdir: pathlib.Path,
  prefix: str,
  make: Callable[[str, int], Awaitable[dict[str, Any]]],
  progress: Progress = iter,
) -> None:
  """Makes the candidates that the folder lacks, until there are enough tasks.

  A candidate that is decided has its row and is not made again; one that was
  being made when the process died has none, and is.

  Args:
    config: of the folder; all but FREE_FIELDS stays what it was.
    workdir: folder of this synthesis.
    prefix: of ids.
    make: coroutine function of an id and an index that gives a row with
      `status` and, where that is "kept", `tasks`, or counts as one.
    progress: wraps the numbers of tasks that are still to be made.

  Raises:
    ValueError: the folder holds another synthesis, or one runs in it.
    Exception: whatever `make` raised; those that run come to their ends.
  """
  with results.ResultsFile(workdir / CANDIDATES_FILE) as file:
    folders.check_config(config, workdir, FREE_FIELDS, "tasks.jsonl")
    asyncio.run(_fill(config, file, prefix, make, progress))


async def _fill(config, file, prefix, make, progress):
  made = sum(map(num_tasks, file.rows.values()))
  bar = iter(progress(range(made, config.num_tasks)))
  ids = ((f"{prefix}-{i:06d}", i) for i in range(config.max_candidates))
  waiting = iter([x for x in ids if x[0] not in file.rows])
  failures: list[Exception] = []

  async def work():
    nonlocal made
    while made < config.num_tasks and not failures:
      row_id, index = next(waiting, (None, 0))
      if row_id is None:
        return
      try:
        row = await make(row_id, index)
      except Exception as error:
        error.add_note(f"in candidate {row_id}")
        failures.append(error)
        return
      file.append({"id": row_id, **row})
      for _ in range(num_tasks(row)):
        made += 1
        next(bar, None)

  async with asyncio.TaskGroup() as group:
    for _ in range(config.concurrency):
      group.create_task(work())
  if failures:
    raise failures[0]


def num_tasks(row: Mapping[str, Any]) -> int:
  """Returns how many tasks a candidate's row holds."""
  return len(row.get("tasks", "-")) if row["status"] == "kept" else 0


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns all candidates in the order of their ids."""
  found = tables.read_jsonl(workdir / CANDIDATES_FILE)
  return sorted(found, key=lambda row: row["id"])


def kept_fingerprints(workdir: pathlib.Path) -> set[str]:
  """Returns those of the folder's kept candidates; none if it is new."""
  path = workdir / CANDIDATES_FILE
  content = path.read_bytes() if path.exists() else b""
  # What a kill cut off has no line end, and is dropped by whoever appends.
  whole = content[: content.rfind(b"\n") + 1].splitlines()
  found = [json.loads(line) for line in whole]
  return {row["fingerprint"] for row in found if num_tasks(row)}


def unfinished(result: loop.EpisodeResult) -> str:
  """Says why an episode handed nothing in."""
  told = f": {result.error}" if result.error else ""
  return f"nothing was handed in, the episode ended with {result.finish}{told}"


def tells_answer(text: str, answer: Any) -> bool:
  """Tells whether all words and numbers of an answer stand in a text.

  An answer with none, and one of truth values alone, is told by nothing.
  """
  found = [leaf for leaf in leaves(answer) if str(leaf).strip()]
  return bool(found) and all(_stands(str(leaf), text) for leaf in found)


def leaves(value: Any) -> list[Any]:
  """Returns the words and numbers that a JSON value holds."""
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, list):
    return [leaf for inner in value for leaf in leaves(inner)]
  return [] if value is None or isinstance(value, bool) else [value]


def _stands(leaf, text):
  pattern = r"(?<![\w.])" + re.escape(leaf.strip()) + r"(?![\w]|\.\d)"
  return re.search(pattern, text, re.IGNORECASE) is not None
