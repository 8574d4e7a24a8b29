"""A whole synthesis of general environments that a model writes.

`candidates.jsonl` has a row an environment, kept or rejected, with every
proposal that was refused and why; a killed run makes the rest. Derived from it
are `environments.jsonl`, the tables of tasks and trajectories, and
`rejections.jsonl`, in the forms of the procedural synthesis (`export`), but
that a tool has `source`, Python, in the place of SQL.
"""

import asyncio
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.environments import written
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis import playing
from dsv32_jax.agents.synthesis.general import campaign
from dsv32_jax.agents.synthesis.general import database
from dsv32_jax.agents.synthesis.general import export as exports
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.general import workshop

CATEGORIES = (
  "trip planning",
  "shift rotas",
  "library lending",
  "meal plans",
  "warehouse picking",
  "course timetables",
  "clinic appointments",
  "museum visits",
  "train connections",
  "garden planting",
  "film festivals",
  "second-hand sales",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralAuthoringConfig(authoring.AuthoringConfig):
  """What a model is asked to write.

  Attributes:
    categories: of environments, taken in turn.
    tasks_of_environment: at most.
    levels: of difficulty.
    least_calls: tool calls of the solution of a task that is kept.
    attempts: a task is kept if one of so many attempts solves it.
    corpus: index of documents that may be searched for data, as
      `search_index.build` writes it; "" for none.
  """

  categories: tuple[str, ...] = CATEGORIES
  tasks_of_environment: int = 3
  levels: int = 4
  least_calls: int = 4
  attempts: int = 100
  corpus: str = ""

  def __post_init__(self):
    super().__post_init__()
    if not self.categories:
      raise ValueError("categories=() must name one at least")
    for name in ("tasks_of_environment", "levels", "least_calls", "attempts"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def run(
  config: GeneralAuthoringConfig,
  workdir: pathlib.Path,
  author: policies.Policy,
  solver: policies.Policy,
  box: sandbox.Sandbox,
  progress: authoring.Progress = iter,
) -> None:
  """Has environments written until there are enough tasks; see authoring.fill.

  Args:
    config: what to make.
    workdir: folder of this synthesis.
    author: writes data, tools and tasks.
    solver: whose success keeps a task; it sees the task and its tools.
    box: where all that is written runs (`workspace.sandbox`).
    progress: wraps the numbers of tasks that are still to be made.
  """
  source = search_index.LocalIndex(config.corpus) if config.corpus else None
  taken = authoring.kept_fingerprints(workdir)
  make = functools.partial(
    candidate, config, author, solver, box, source=source, taken=taken
  )
  authoring.fill(config, workdir, "authored", make, progress)


async def candidate(
  config: GeneralAuthoringConfig,
  author: policies.Policy,
  solver: policies.Policy,
  box: sandbox.Sandbox,
  row_id: str,
  index: int,
  *,
  source: search_index.Source | None = None,
  taken: set[str] | None = None,
) -> dict[str, Any]:
  """Has one environment written; returns its row.

  Args:
    config: what to make.
    author: see `run`.
    solver: see `run`.
    box: see `run`.
    row_id: of the row.
    index: of the category.
    source: that may be searched.
    taken: fingerprints of data that other environments have; grows by this.
  """
  taken = set() if taken is None else taken
  category = config.categories[index % len(config.categories)]
  shop = workshop.Workshop(
    category,
    box,
    source=source,
    most_tasks=config.tasks_of_environment,
    levels=config.levels,
  )
  episode = await loop.run_episode(
    author, lambda: shop, episode_id=row_id, limits=config.limits()
  )
  work = shop.work
  row = {
    "id": row_id,
    "category": category,
    "finish": episode.result.finish,
    "turns": episode.result.num_turns,
    "fingerprint": database.fingerprint(work.rows),
    "rejections": work.rejections,
  }
  if not work.tasks:
    return _rejected(row, authoring.unfinished(episode.result))
  if row["fingerprint"] in taken:
    return _rejected(row, "its data equal those of another")
  taken.add(row["fingerprint"])
  record = {"rows": work.rows, "tools": work.tools}
  kept = [
    task
    async for task in _kept_tasks(config, solver, box, row, record, work.tasks)
  ]
  if not kept:
    taken.discard(row["fingerprint"])
    return _rejected(row, "no task was kept")
  return {**row, "status": "kept", **record, "tasks": kept}


async def _kept_tasks(config, solver, box, row, record, made):
  """Yields the tasks that are kept; the row notes why others are not."""
  for number, task in enumerate(made):
    task = {"id": f"{row['id']}-{number}", "kind": row["category"], **task}
    reason = f"pass@{config.attempts} is zero"
    if task["solution_calls"] < config.least_calls:
      reason = f"its solution makes less than {config.least_calls} tool calls"
    else:
      used = await solved_after(record, task, solver, box, config)
      if used is not None:
        yield {**task, "attempts_until_solved": used}
        continue
    row["rejections"].append(
      {"task": number, "level": task["level"], "reason": reason}
    )


def _rejected(row, reason):
  return {**row, "status": "rejected", "reason": reason}


async def solved_after(
  record: Mapping[str, Any],
  task: Mapping[str, Any],
  solver: policies.Policy,
  box: sandbox.Sandbox,
  config: GeneralAuthoringConfig,
) -> int | None:
  """Returns how many attempts a policy's first success took, or None."""
  for attempt in range(1, config.attempts + 1):
    episode = await loop.run_episode(
      solver,
      lambda: written.WrittenEnvironment(record, task, box),
      episode_id=f"{task['id']}/{attempt}",
      limits=config.limits(),
    )
    if episode.result.reward > 0:
      return attempt
  return None


def export(workdir: pathlib.Path, box: sandbox.Sandbox) -> None:
  """Writes every derived file; solutions are played once more for it."""
  path = workdir / campaign.ENVIRONMENTS_FILE
  tables.write_jsonl(path, _environments(workdir))
  tables.write(workdir / "tasks", exports.task_rows(path), exports.TASK_SCHEMA)
  tables.write(
    workdir / "trajectories",
    (
      _trajectory_row(record, task, box)
      for record in campaign.read(path)
      for task in record["tasks"]
    ),
    exports.TRAJECTORY_SCHEMA,
  )
  tables.write_jsonl(workdir / "rejections.jsonl", _rejections(workdir))


def _environments(workdir) -> Iterator[dict[str, Any]]:
  for row in authoring.rows(workdir):
    if row["status"] == "kept":
      yield {
        "id": row["id"],
        "domain": row["category"],
        "fingerprint": row["fingerprint"],
        "pair": pipeline.pair(row["rows"], row["tools"]),
        "rows": row["rows"],
        "tools": row["tools"],
        "tasks": row["tasks"],
        "rejections": row["rejections"],
      }


def _rejections(workdir) -> Iterator[dict[str, Any]]:
  for row in authoring.rows(workdir):
    shown = {"environment": row["id"], "kind": row["category"]}
    for rejection in row["rejections"]:
      yield {**shown, **rejection}
    if row["status"] != "kept":
      yield {**shown, "task": 0, "level": 0, "reason": row["reason"]}


def _trajectory_row(record, task, box):
  messages, reward = asyncio.run(trajectory(record, task, box))
  text = json.dumps(messages, ensure_ascii=False)
  return {"id": task["id"], "reward": reward, "messages": text}


async def trajectory(
  record: Mapping[str, Any], task: Mapping[str, Any], box: sandbox.Sandbox
) -> tuple[list[dict[str, Any]], float]:
  """Plays a task's solution; returns its messages and the reward."""
  world = written.WrittenWorld(box, record["rows"], record["tools"])
  try:
    answer, calls = await world.solve(task["solution"])
  finally:
    world.close()
  submitted = {"answer_text": json.dumps(answer, ensure_ascii=False)}
  environment = written.WrittenEnvironment(record, task, box)
  try:
    player = playing.Player(environment)
    await player.begin()
    for name, arguments in [*calls, (written.SUBMIT.name, submitted)]:
      await player.call(name, arguments)
    return player.messages, await environment.verify()
  finally:
    await environment.close()


def report(workdir: pathlib.Path) -> dict[str, Any]:
  """Counts what the folder holds."""
  rows = authoring.rows(workdir)
  kept = [row for row in rows if row["status"] == "kept"]
  tasks = [task for row in kept for task in row["tasks"]]
  reasons: dict[str, int] = {}
  for rejection in _rejections(workdir):
    reason = rejection["reason"][:80]
    reasons[reason] = reasons.get(reason, 0) + 1
  return {
    "candidates": len(rows),
    "environments": len(kept),
    "tasks": len(tasks),
    "rejections": dict(sorted(reasons.items(), key=lambda x: -x[1])),
    "solution_calls": sorted(task["solution_calls"] for task in tasks),
  }
