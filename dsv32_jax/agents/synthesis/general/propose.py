"""Proposes tasks: solve, verify, raise the difficulty, add what tools lack."""

from collections.abc import Callable
import dataclasses
import random
from typing import Any

from dsv32_jax.agents.environments import general
from dsv32_jax.agents.synthesis.general import bundles
from dsv32_jax.agents.synthesis.general import conditions
from dsv32_jax.agents.synthesis.general import programs
from dsv32_jax.agents.synthesis.general import queries
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import tool_specs
from dsv32_jax.agents.synthesis.general import toolset as toolset_lib
from dsv32_jax.agents.synthesis.general import trips

KINDS = (*queries.KINDS, "bundle")
MAX_LEVEL = 4
_TRIES = 12
Reject = Callable[[str, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
  """An environment under construction.

  Attributes:
    data: rows and domain.
    toolset: to which tools are added.
    connection: to the database of the rows.
  """

  data: conditions.Data
  toolset: toolset_lib.Toolset
  connection: Any


def propose(
  world: World, kind: str, rng: random.Random, reject: Reject
) -> dict[str, Any]:
  """Proposes a simple task and makes it harder, level by level.

  Args:
    world: environment; its toolset may grow.
    kind: one of KINDS, or "trip".
    rng: source of choices.
    reject: is told (kind, level, reason) of each draft that is not kept.

  Returns:
    The record of the hardest level that was reached. Its `history` tells each
    level's solution length and the tools that were added for it.

  Raises:
    tasks.Rejection: if not even two levels were reached: the simplest tasks
      are where the search begins, not what is wanted.
  """
  record, history = None, []
  top = rng.randint(2, MAX_LEVEL)
  for level in range(1, top + 1):
    found = _try_level(world, kind, level, rng, reject)
    if found is None:
      break
    history.append(found.pop("step"))
    record = found
  if record is None or record["level"] < 2:
    raise tasks.Rejection(f"{kind} did not get beyond its simplest level")
  return record | {"history": history}


def accept(world: World, draft: tasks.Draft) -> dict[str, Any]:
  """Runs a draft's solution and verifier.

  Returns:
    `answer`, and `solution_calls`, how many tool calls the solution took.

  Raises:
    tasks.Rejection: if the verifier refuses the solution's answer or accepts
      a wrong one, or there are too few wrong ones.
    ValueError: if a program does what it must not.
  """
  calls: list[tuple[str, Any, Any]] = []
  specs = world.toolset.specs()
  functions = general.Tools(specs, world.connection).functions(calls)
  programs.check(draft.solution, "solve", 0, functions)
  answer = programs.load(draft.solution, "solve", functions)()
  if answer is None:
    raise tasks.Rejection("the solution finds no answer")
  if len(draft.wrong_answers) < tasks.MIN_WRONG_ANSWERS:
    raise tasks.Rejection(f"only {len(draft.wrong_answers)} wrong answers")
  judge = general.Judge(draft.answer_schema, draft.verifier, world.connection)
  if not judge.accepts(answer):
    raise tasks.Rejection("the verifier refuses the solution's answer")
  for wrong in draft.wrong_answers:
    if not judge.fits(wrong):
      raise tasks.Rejection("a wrong answer is not well formed")
    if judge.accepts(wrong):
      raise tasks.Rejection("the verifier accepts a wrong answer")
  return {"answer": answer, "solution_calls": len(calls)}


def _try_level(world, kind, level, rng, reject):
  """Returns the record of a level, or None where no draft was kept."""
  for _ in range(_TRIES):
    try:
      make = _drawn(world, kind, level, rng)
      draft, added = _made(world, make)
      found = accept(world, draft)
    except tasks.Rejection as rejection:
      reject(kind, level, str(rejection))
      continue
    return {
      "kind": draft.kind,
      "level": level,
      "statement": draft.statement,
      "answer_schema": dict(draft.answer_schema),
      "solution": draft.solution,
      "verifier": draft.verifier,
      "wrong_answers": list(draft.wrong_answers),
      **found,
      "step": {
        "level": level,
        "solution_calls": found["solution_calls"],
        "added_tools": added,
      },
    }
  return None


def _drawn(world, kind, level, rng):
  """Draws what a task is about; returns the function that writes it."""
  data = world.data
  if kind == "trip":
    drawn, make = trips.draw(data, level, rng), trips.make
  elif kind == "bundle":
    drawn, make = bundles.draw(data, level - 1, rng), bundles.make
  else:
    drawn, make = queries.draw(data, kind, level + 1, rng), queries.make
  seed = rng.random()
  return lambda: make(data, drawn, world.toolset, random.Random(seed))


def _made(world, make):
  """Writes the task, adding tools until they suffice."""
  added = []
  while True:
    try:
      return make(), added
    except toolset_lib.MissingTool as missing:
      before = {spec.name for spec in world.toolset.specs()}
      world.toolset.parts.add(missing.part)
      specs: list[tool_specs.ToolSpec] = world.toolset.specs()
      added += [spec.name for spec in specs if spec.name not in before]
