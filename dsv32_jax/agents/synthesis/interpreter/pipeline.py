"""A whole synthesis of interpreter tasks in one folder, continued if killed.

`candidates.jsonl` has a row a candidate in order, and is all there is to know.
Derived from it:

`tasks.jsonl`, `tasks.parquet`: a row a task, see TASK_SCHEMA; `files` is JSON,
`solution` a program that prints the answer.
`rejections.jsonl`: id, kind, stage ("check", "twice", "equal"), reason.
`trajectories.jsonl`, `trajectories.parquet`: solutions played in the
environment, as those of other families.
"""

import asyncio
import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
import sys
from typing import Any

import pyarrow as pa

from dsv32_jax.agents import interpreter as interpreters
from dsv32_jax.agents import results
from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import interpreter
from dsv32_jax.agents.synthesis import playing
from dsv32_jax.agents.synthesis.general import campaign as folders
from dsv32_jax.agents.synthesis.interpreter import checks
from dsv32_jax.agents.synthesis.interpreter import problems

CANDIDATES_FILE = "candidates.jsonl"
_FREE = ("workers", "num_tasks", "num_trajectories")
_TEXT = pa.string()
TASK_SCHEMA = pa.schema(
  {
    "id": _TEXT,
    "kind": _TEXT,
    "statement": _TEXT,
    "files": _TEXT,
    "answer": _TEXT,
    "tolerance": pa.float64(),
    "solution": _TEXT,
    "work": pa.int64(),
  }
)
TRAJECTORY_SCHEMA = pa.schema(
  {"id": _TEXT, "reward": pa.float64(), "messages": _TEXT}
)
_LIMITS = sandbox.Limits(
  wall_seconds=60.0, cpu_seconds=60, memory_bytes=4 << 30
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpreterSynthesisConfig:
  """What to synthesise; the default is the paper's number of tasks.

  Attributes:
    seed: equal seeds give equal files.
    num_tasks: that are kept.
    num_trajectories: solutions played in a kernel, of the first tasks.
    workers: processes; they do not change what is written.
  """

  seed: int = 0
  num_tasks: int = 5908
  num_trajectories: int = 100
  workers: int = 2

  def __post_init__(self):
    for name in ("num_tasks", "workers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if self.num_trajectories < 0:
      raise ValueError(
        f"num_trajectories={self.num_trajectories} must not be negative"
      )

  @property
  def most_candidates(self) -> int:
    return 3 * self.num_tasks + 100


def run(
  config: InterpreterSynthesisConfig,
  workdir: pathlib.Path,
  progress: Callable[[range], Iterable[int]] = iter,
) -> None:
  """Makes candidates until enough are kept.

  Args:
    config: what to make.
    workdir: folder of this synthesis.
    progress: wraps the numbers of tasks still to be kept.

  Raises:
    ValueError: the folder holds another synthesis, or one runs in it.
    RuntimeError: too few candidates are kept.
  """
  with results.ResultsFile(workdir / CANDIDATES_FILE) as file:
    folders.check_config(config, workdir, _FREE, "tasks.jsonl")
    rows = file.rows.values()
    known = {row["fingerprint"] for row in rows if row["status"] == "kept"}
    wanted = iter(progress(range(len(known), config.num_tasks)))
    if next(wanted, None) is None:
      return
    waiting = range(len(rows), config.most_candidates)
    make = functools.partial(candidate, config.seed)
    with folders.in_order(make, waiting, config.workers) as made:
      for row in made:
        if row["status"] == "kept" and row["fingerprint"] in known:
          row = _rejected(row, "equal", "it equals another question")
        file.append(row)
        if row["status"] == "kept":
          known.add(row["fingerprint"])
          if next(wanted, None) is None:
            return
  raise RuntimeError(f"{config.most_candidates} candidates give too few tasks")


def candidate(seed: int, index: int) -> dict[str, Any]:
  """Returns the row of a candidate: kept with its task, or why it is not."""
  place = index % len(checks.GENERATORS)
  rng = random.Random(f"{seed}/{index}")
  problem = checks.GENERATORS[place](rng)
  content = json.dumps([problem.statement, problem.files]).encode()
  row = {
    "id": f"interpreter-{index:06d}",
    "kind": problem.kind,
    "fingerprint": hashlib.sha256(content).hexdigest()[:16],
  }
  if reason := checks.reason_to_reject(problem, place):
    return _rejected(row, "check", reason)
  if reason := _differs(problem, row["id"]):
    return _rejected(row, "twice", reason)
  guesses = {
    "number_of_statement": rng.choice(sorted(checks.cheap_guesses(problem))),
    "answer_of_another": rng.choice(checks.siblings(place)),
  }
  task = checks.task_of(problem, row["id"])
  return {
    **row,
    "status": "kept",
    "task": dataclasses.asdict(task),
    "solution": problem.solution,
    "work": problem.work,
    "baselines": {
      name: interpreter.accepts(task, text) for name, text in guesses.items()
    },
  }


def _rejected(row, stage, reason):
  kept = ("id", "kind", "fingerprint")
  shown = {name: row[name] for name in kept}
  return {**shown, "status": "rejected", "stage": stage, "reason": reason}


def _differs(problem: problems.Problem, name: str) -> str:
  """Computes the answer the other way; tells if it comes out otherwise."""
  command = [sys.executable, "-I", "-c", problem.solution]
  ended = _box().run(command, files=problem.files, limits=_LIMITS)
  if ended.returncode != 0:
    return f"the solution ended with {ended.reason} {ended.returncode}"
  text = ended.stdout.decode("utf-8", "replace")
  if not interpreter.accepts(checks.task_of(problem, name), text):
    return "two computations give two answers"
  return ""


@functools.lru_cache(maxsize=1)
def _box() -> sandbox.Sandbox:
  return sandbox.Sandbox(sandbox.probe().require())


def export(workdir: pathlib.Path, num_trajectories: int) -> None:
  """Writes every derived file."""
  path = workdir / CANDIDATES_FILE
  shown = ("id", "kind", "stage", "reason")
  tables.write_jsonl(
    workdir / "rejections.jsonl",
    (
      {name: row[name] for name in shown}
      for row in tables.read_jsonl(path)
      if row["status"] != "kept"
    ),
  )
  tables.write(workdir / "tasks", map(_task_row, _kept(path)), TASK_SCHEMA)
  chosen = (row for row, _ in zip(_kept(path), range(num_trajectories)))
  tables.write(
    workdir / "trajectories", map(_trajectory_row, chosen), TRAJECTORY_SCHEMA
  )


def report(workdir: pathlib.Path) -> dict[str, Any]:
  """Counts what the folder holds; baselines are shares of tasks guessed."""
  rows = list(tables.read_jsonl(workdir / CANDIDATES_FILE))
  kept = [row for row in rows if row["status"] == "kept"]
  guessed = collections.Counter()
  for row in kept:
    guessed.update(row["baselines"])
  played = list(tables.read_jsonl(workdir / "trajectories.jsonl"))
  return {
    "candidates": len(rows),
    "tasks": len(kept),
    "kinds": dict(collections.Counter(row["kind"] for row in kept)),
    "answers": len({row["task"]["answer"] for row in kept}),
    "rejections": dict(
      collections.Counter(
        f"{row['kind']}: {row['reason']}"
        for row in rows
        if row["status"] != "kept"
      ).most_common()
    ),
    "baselines": {name: n / len(kept) for name, n in guessed.items()},
    "trajectories": len(played),
    "trajectories_rewarded": sum(row["reward"] == 1 for row in played),
  }


async def trajectory(
  task: interpreter.InterpreterTask, solution: str
) -> tuple[list[dict[str, Any]], float]:
  """Plays a solution in a kernel; returns messages and reward."""
  environment = interpreter.InterpreterEnvironment(
    task, lambda files: interpreters.Interpreter(_box(), files=files)
  )
  try:
    player = playing.Player(environment)
    await player.begin()
    printed = await player.call("python", {"code": solution})
    await player.call("submit_result", {"answer_text": printed})
    return player.messages, await environment.verify()
  finally:
    await environment.close()


def _trajectory_row(row):
  task = interpreter.InterpreterTask(**row["task"])
  messages, reward = asyncio.run(trajectory(task, row["solution"]))
  text = json.dumps(messages, ensure_ascii=False)
  return {"id": task.id, "reward": reward, "messages": text}


def _task_row(row):
  task = row["task"]
  files = json.dumps(task["files"], ensure_ascii=False)
  whole = {**task, "files": files, "solution": row["solution"]}
  whole["work"] = row["work"]
  return {name: whole[name] for name in TASK_SCHEMA.names}


def _kept(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  return (row for row in tables.read_jsonl(path) if row["status"] == "kept")
