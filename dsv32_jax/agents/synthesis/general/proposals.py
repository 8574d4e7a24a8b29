"""Whether a task that a model wrote is one: what a proposal has to pass.

All that is run, runs in the sandbox of the written world. A solution may only
call tools and compute; it is run twice, and each of its calls has to be one
that an agent could make. A verifier has to accept the solution's answer and to
refuse every wrong one, and nearly all that are drawn at random from the schema.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import random
from typing import Any

from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import written
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis.general import policies
from dsv32_jax.agents.synthesis.general import programs
from dsv32_jax.agents.synthesis.general import tasks

# The share of random answers that may be right, and how many are drawn.
_LUCK, _DRAWN = 0.05, 60
_MOST_SCHEMA_DEPTH = 8
# Of a solution's calls, those that are looked at one by one.
_MOST_REPLAYED = 300
# No reference, no pattern that takes for ever, nothing that is not drawn from.
_SCHEMA_KEYS = {
  *("type", "properties", "required", "additionalProperties", "items", "enum"),
  *("minItems", "maxItems", "minimum", "maximum", "description"),
}
_TYPES = ("object", "array", "string", "integer", "number", "boolean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
  """A task as a model hands it in; see tasks.Draft."""

  statement: str
  answer_schema: Mapping[str, Any]
  solution: str
  verifier: str
  wrong_answers: Sequence[Any]


def check_schema(schema: Any, depth: int = 0) -> None:
  """Raises tasks.Rejection for a schema with other than plain parts."""
  if not isinstance(schema, Mapping) or depth > _MOST_SCHEMA_DEPTH:
    raise tasks.Rejection("a schema is no object, or nested too deeply")
  if others := sorted(set(schema) - _SCHEMA_KEYS):
    raise tasks.Rejection(
      f"a schema may not use {others[0]!r}, only"
      f" {', '.join(sorted(_SCHEMA_KEYS))}"
    )
  if schema.get("type") not in _TYPES:
    raise tasks.Rejection(f"the type of a schema must be of {_TYPES}")
  inner = schema.get("properties", {})
  if schema["type"] == "array" and "items" not in schema:
    raise tasks.Rejection("an array needs a schema of its items")
  if not isinstance(inner, Mapping):
    raise tasks.Rejection("the properties of a schema are no object")
  items = [schema["items"]] if "items" in schema else []
  for value in [*inner.values(), *items]:
    check_schema(value, depth + 1)


async def judge(
  box: sandbox.Sandbox,
  rows: Mapping[str, Sequence[Mapping[str, Any]]],
  written_tools: Sequence[Mapping[str, Any]],
  proposal: Proposal,
  least_calls: int,
) -> dict[str, Any]:
  """Runs a proposal's programs.

  Args:
    box: where they run.
    rows: of the database.
    written_tools: of the environment.
    proposal: what was handed in.
    least_calls: tool calls that the solution has to make.

  Returns:
    The record of the task, without id, kind and level.

  Raises:
    tasks.Rejection: it is no task; the message says why.
  """
  try:
    return await _judge(box, rows, written_tools, proposal, least_calls)
  except tools.ToolError as error:  # of what it wrote
    raise tasks.Rejection(str(error)) from error
  except ValueError as error:
    raise tasks.Rejection(str(error).split("\n")[0]) from error


async def _judge(box, rows, written_tools, proposal, least_calls):
  check_schema(proposal.answer_schema)
  checker = general.answer_checker(proposal.answer_schema)
  names = [tool["name"] for tool in written_tools]
  programs.check(proposal.solution, "solve", 0, names)
  programs.check(proposal.verifier, "verify", 1, ("query",))
  answer, calls = await _solved_twice(box, rows, written_tools, proposal)
  if len(calls) < least_calls:
    raise tasks.Rejection(
      f"the solution makes {len(calls)} tool calls, not {least_calls} or more"
    )
  _check_calls(written_tools, calls)
  if answer is None:
    raise tasks.Rejection("the solution finds no answer")
  wrong = _check_answers(checker, answer, proposal)
  await _check_single_calls(box, rows, written_tools, calls, answer)
  drawn = _random_answers(checker, rows, answer, proposal)
  world = written.WrittenWorld(box, rows)
  try:
    said = await world.verify(
      proposal.verifier, [answer, answer, *wrong, *drawn]
    )
  finally:
    world.close()
  if not all(said[:2]):
    raise tasks.Rejection("the verifier refuses the solution's answer")
  if any(said[2 : 2 + len(wrong)]):
    place = said.index(True, 2) - 2
    raise tasks.Rejection(f"the verifier accepts wrong answer {place + 1}")
  lucky = sum(said[2 + len(wrong) :])
  if lucky > _LUCK * len(drawn):
    raise tasks.Rejection(
      f"the verifier accepts {lucky} of {len(drawn)} answers drawn at random"
    )
  return {
    "statement": proposal.statement,
    "answer_schema": dict(proposal.answer_schema),
    "solution": proposal.solution,
    "verifier": proposal.verifier,
    "wrong_answers": wrong,
    "answer": answer,
    "solution_calls": len(calls),
  }


async def _solved_twice(box, rows, written_tools, proposal):
  found = []
  for _ in range(2):
    world = written.WrittenWorld(box, rows, written_tools)
    try:
      found.append(await world.solve(proposal.solution))
    except tools.ToolError as error:
      raise tasks.Rejection(f"the solution: {error}") from error
    finally:
      world.close()
  if found[0] != found[1]:
    raise tasks.Rejection("the solution does not give the same twice")
  return found[0]


def _check_calls(written_tools, calls):
  checker = tools.CallChecker(written.schemas(written_tools))
  for name, arguments in calls:
    try:
      checker.check(name, arguments)
    except tools.ToolError as error:
      raise tasks.Rejection(
        f"the solution makes a call that no agent can make: {error}"
      ) from error


async def _check_single_calls(box, rows, written_tools, calls, answer):
  """Refuses a tool that does the work: one call that tells little but that."""
  world = written.WrittenWorld(box, rows, written_tools)
  most = 2 * len(authoring.leaves(answer))
  distinct = {json.dumps(call, sort_keys=True): call for call in calls}
  try:
    for name, arguments in list(distinct.values())[:_MOST_REPLAYED]:
      told = await world.call_tool(name, arguments)
      is_little = len(authoring.leaves(told)) <= most
      if is_little and authoring.tells_answer(json.dumps(told), answer):
        raise tasks.Rejection(f"one call of {name} tells the answer")
  finally:
    world.close()


def _check_answers(checker, answer, proposal):
  """Returns the wrong answers, without repetitions."""
  _require_fit(checker, answer, "the solution's answer")
  wrong: list[Any] = []
  for value in proposal.wrong_answers:
    _require_fit(checker, value, "a wrong answer")
    if value == answer:
      raise tasks.Rejection("a wrong answer is the solution's own")
    if value not in wrong:
      wrong.append(value)
  if len(wrong) < tasks.MIN_WRONG_ANSWERS:
    raise tasks.Rejection(f"only {len(wrong)} different wrong answers")
  text = f"{proposal.statement} {json.dumps(proposal.answer_schema)}"
  if authoring.tells_answer(text, answer):
    raise tasks.Rejection("the text of the task tells the answer")
  return wrong


def _require_fit(checker, value, what):
  try:
    checker.check("answer", {"answer": value})
  except tools.ToolError as error:
    raise tasks.Rejection(f"{what} is not of the schema: {error}") from error


def _random_answers(checker, rows, answer, proposal):
  """Returns answers of the schema, drawn from the database's values."""
  rng = random.Random(proposal.statement)
  values = [v for records in rows.values() for r in records for v in r.values()]
  found = []
  for _ in range(_DRAWN):
    value = policies.random_value(proposal.answer_schema, values, rng)
    try:
      checker.check("answer", {"answer": value})
    except tools.ToolError:
      continue
    if value != answer:
      found.append(value)
  return found
