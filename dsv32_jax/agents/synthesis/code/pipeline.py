"""A whole synthesis of code tasks in one folder, continued if killed.

`candidates.jsonl` has a row a candidate, kept or rejected, written once it is
decided; a run that was killed decides the rest. All else is derived from it:

`tasks.jsonl`, `tasks.parquet`: a row a task, see TASK_SCHEMA and
`repository.grading.CodeTask`; `hidden`, `must_pass`, `must_fail` and `setup`
are JSON.
`rejections.jsonl`: id, stage ("filter", "judge", "build", "patch", "tests",
"flaky", "setup"), reason.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import itertools
import json
import pathlib
import re
from typing import Any

import pyarrow as pa

from dsv32_jax import config_files
from dsv32_jax.agents import results
from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tables
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.synthesis.code import candidates
from dsv32_jax.agents.synthesis.code import filters as filters_lib
from dsv32_jax.agents.synthesis.code import validate
from dsv32_jax.agents.synthesis.general import campaign as folders

CANDIDATES_FILE = "candidates.jsonl"
# They decide how much is done, or how fast; and a server may have moved.
_FREE = ("workers", "max_commits", "max_tasks", "judge_url", "setup_url")
_TEXT, _NUMBER = pa.string(), pa.int64()
TASK_SCHEMA = pa.schema(
  {
    **{field.name: _TEXT for field in dataclasses.fields(grading.CodeTask)},
    **{field.name: _NUMBER for field in dataclasses.fields(validate.Counts)},
  }
)
Progress = Callable[[Iterable[Any]], Iterable[Any]]
Prepare = Callable[
  ..., tuple[grading.CodeTask, validate.Counts, dict[str, float]]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeSynthesisConfig:
  """What to mine, and where it runs.

  Attributes:
    repository: folder of a clone, or with `instances` of clones.
    revision: where its history is begun from.
    instances: JSONL file in the form of SWE-bench, in place of a history.
    issues: JSONL file of {number, title, body}, for messages that close one.
    max_commits: of the history, or instances.
    max_tasks: after as many kept candidates no other is begun; 0: no bound.
    only: regular expression that a touched test file has to match.
    setup: command lines that build a tree.
    readable: folders outside the system that commands may read.
    path: folders of programs, before the system's.
    environment: variables of commands.
    memory_gib: of all processes of a run, and address space of each.
    processes: and threads, of a run.
    seconds: of each command.
    filters: bounds of the heuristics.
    judge_url: of an OpenAI-compatible server whose model judges what passes
      the heuristics; empty: no model judges.
    judge_model: its name there.
    setup_url: of a server whose model finds out by shell how each tree is built
      and tested; empty: `setup` and the language's runner do for all.
    setup_model: its name there.
    setup_turns: replies of that model on one candidate.
    workers: candidates at a time.
  """

  repository: str = "."
  revision: str = "HEAD"
  instances: str = ""
  issues: str = ""
  max_commits: int = 1000
  max_tasks: int = 0
  only: str = ""
  setup: tuple[str, ...] = ()
  readable: tuple[str, ...] = ()
  path: tuple[str, ...] = ()
  environment: dict[str, str] = dataclasses.field(default_factory=dict)
  memory_gib: int = 8
  processes: int = 256
  seconds: float = 300.0
  filters: filters_lib.FilterConfig = dataclasses.field(
    default_factory=filters_lib.FilterConfig
  )
  judge_url: str = ""
  judge_model: str = ""
  setup_url: str = ""
  setup_model: str = ""
  setup_turns: int = 50
  workers: int = 2

  def __post_init__(self):
    for name in (
      "max_commits",
      "memory_gib",
      "processes",
      "workers",
      "setup_turns",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if self.max_tasks < 0 or not self.seconds > 0:
      raise ValueError(
        f"max_tasks={self.max_tasks} must not be negative, seconds="
        f"{self.seconds} must be positive"
      )
    try:
      re.compile(self.only)
    except re.error as error:
      raise ValueError(f"only={self.only!r}: {error}") from error


def run(
  config: CodeSynthesisConfig,
  workdir: pathlib.Path,
  progress: Progress = iter,
  judge: filters_lib.Filter | None = None,
  prepare: Prepare = validate.validate,
) -> None:
  """Decides the candidates that the folder has no row of.

  Args:
    config: what to do.
    workdir: folder of this synthesis.
    progress: wraps the candidates that are still to be decided.
    judge: a model's judgement behind the heuristics, see filters.judged_by.
    prepare: builds a tree and validates the pair; see setup_agent.prepared_by
      for a model that finds out how.

  Raises:
    ValueError: the folder holds another synthesis or is in use, or there is
      no such repository, revision or file.
    SandboxError: no sandbox works here.
  """
  with results.ResultsFile(workdir / CANDIDATES_FILE) as file:
    folders.check_config(config, workdir, _FREE, "tasks.jsonl")
    box = workspaces.sandbox(
      sandbox.probe().require(),
      readable=config.readable,
      path=config.path,
      environment=config.environment,
    )
    waiting = [c for c in mined(config) if c.id not in file.rows]
    kept = sum(row["status"] == "kept" for row in file.rows.values())
    decide = lambda candidate: decided(candidate, config, box, judge, prepare)
    for row in _in_parallel(decide, progress(waiting), config.workers):
      file.append(row)
      kept += row["status"] == "kept"
      if config.max_tasks and kept >= config.max_tasks:
        break


def mined(config: CodeSynthesisConfig) -> Iterator[candidates.Candidate]:
  """Yields the candidates of a config, no id twice."""
  if config.instances:
    found = candidates.from_instances(config.instances, config.repository)
    found = itertools.islice(found, config.max_commits)
  else:
    issues = candidates.read_issues(config.issues) if config.issues else {}
    found = candidates.from_history(
      config.repository, config.revision, config.max_commits, issues
    )
  seen = set()
  for candidate in found:
    if candidate.id in seen:
      raise ValueError(f"{config.instances}: {candidate.id} is there twice")
    seen.add(candidate.id)
    yield candidate


def decided(
  candidate: candidates.Candidate,
  config: CodeSynthesisConfig,
  box: sandbox.Sandbox,
  judge: filters_lib.Filter | None = None,
  prepare: Prepare = validate.validate,
) -> dict[str, Any]:
  """Returns the row of a candidate: kept with its task, or why it is not."""
  row = {"id": candidate.id, "language": candidate.language}
  reason = filters_lib.heuristics(candidate, config.filters)
  if not reason and not _is_wanted(candidate, config.only):
    reason = "no touched test file is among those asked for"
  if reason:
    return {**row, "status": "rejected", "stage": "filter", "reason": reason}
  if judge is not None and (reason := judge(candidate)):
    return {**row, "status": "rejected", "stage": "judge", "reason": reason}
  limits = dataclasses.replace(
    workspaces.default_limits(),
    memory_bytes=config.memory_gib << 30,
    processes=config.processes,
  )
  try:
    task, counts, seconds = prepare(
      candidate,
      box,
      setup=config.setup,
      limits=limits,
      seconds=config.seconds,
    )
  except validate.Rejection as rejection:
    row |= {"status": "rejected", "stage": rejection.stage}
    return {**row, "reason": str(rejection)}
  return {
    **row,
    "status": "kept",
    "counts": dataclasses.asdict(counts),
    "seconds": seconds,
    "task": config_files.dump(task),
  }


def export(workdir: pathlib.Path) -> None:
  """Writes every derived file, in the order of ids."""
  rows = _rows(workdir)
  shown = ("id", "stage", "reason")
  tables.write_jsonl(
    workdir / "rejections.jsonl",
    ({k: row[k] for k in shown} for row in rows if row["status"] != "kept"),
  )
  tables.write(
    workdir / "tasks",
    (
      {
        **{
          name: value if isinstance(value, str) else json.dumps(value)
          for name, value in row["task"].items()
        },
        **row["counts"],
      }
      for row in rows
      if row["status"] == "kept"
    ),
    TASK_SCHEMA,
  )


def read_tasks(path: pathlib.Path) -> Iterator[grading.CodeTask]:
  """Yields the tasks of tasks.jsonl; ValueError naming what is wrong."""
  counts = {field.name for field in dataclasses.fields(validate.Counts)}
  for number, row in enumerate(tables.read_jsonl(path), 1):
    values = {
      name: json.loads(value) if name in _JSON else value
      for name, value in row.items()
      if name not in counts
    }
    yield config_files.build(grading.CodeTask, values, f"{path}:{number}")


def report(workdir: pathlib.Path) -> dict[str, Any]:
  """Counts what the folder holds; seconds are sums over the kept."""
  rows = _rows(workdir)
  kept = [row for row in rows if row["status"] == "kept"]
  reasons: dict[str, collections.Counter] = {}
  for row in rows:
    if row["status"] != "kept":
      stage = reasons.setdefault(row["stage"], collections.Counter())
      # What differs from one candidate to the next is no reason of its own.
      stage[re.sub(r"[:;(].*", "", row["reason"])[:80]] += 1
  counts, seconds = collections.Counter(), collections.Counter()
  for row in kept:
    counts.update(row["counts"])
    seconds.update(row["seconds"])
  return {
    "candidates": len(rows),
    "tasks": len(kept),
    "languages": dict(collections.Counter(row["language"] for row in kept)),
    "counts": dict(counts),
    "rejections": {
      stage: dict(found.most_common()) for stage, found in reasons.items()
    },
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
  }


_JSON = ("hidden", "must_pass", "must_fail", "setup", "runner")


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  path = workdir / CANDIDATES_FILE
  return sorted(tables.read_jsonl(path), key=lambda row: row["id"])


def _is_wanted(candidate, only: str) -> bool:
  files = candidates.patched_files(candidate.test_patch)
  return any(re.search(only, file.path) for file in files)


def _in_parallel(work, items, workers: int):
  """Yields results as they come; few items are begun ahead of them.

  Threads do: the work is done by processes in sandboxes.
  """
  items = iter(items)
  with futures.ThreadPoolExecutor(workers) as pool:
    running = {
      pool.submit(work, item) for item in itertools.islice(items, workers)
    }
    try:
      while running:
        done, running = futures.wait(
          running, return_when=futures.FIRST_COMPLETED
        )
        for future in done:
          yield future.result()
          running |= {
            pool.submit(work, item) for item in itertools.islice(items, 1)
          }
    finally:
      for future in running:
        future.cancel()
