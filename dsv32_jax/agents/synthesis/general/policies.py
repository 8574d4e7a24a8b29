"""Policies that need no model: random, of one call, planning, searching.

A policy plays one attempt of an episode. It gets what `reset` gave, a function
that carries out a call, and a source of chance; it sees nothing else.
"""

from collections.abc import Callable
import json
import random
from typing import Any

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import planning
from dsv32_jax.agents.synthesis.general import reading
from dsv32_jax.agents.synthesis.general import searching

Call = Callable[[str, Any], protocol.Step]
Policy = Callable[[protocol.Start, Call, random.Random], None]

_RANDOM_CALLS = 12


def random_policy(start: protocol.Start, call: Call, rng: random.Random):
  """Calls random tools with what it has seen and submits a random answer."""
  seen: list[Any] = []
  tools = [tool for tool in start.tools if tool.name != "submit_result"]
  for _ in range(_RANDOM_CALLS):
    tool = rng.choice(tools)
    step = call(tool.name, _arguments(tool, seen, rng))
    if not step.observation.startswith("error"):
      seen += _leaves(json.loads(step.observation))
  _submit(start, call, seen, rng)


def one_call(start: protocol.Start, call: Call, rng: random.Random):
  """Makes one call that needs no name, and answers from what it tells."""
  tools = [
    tool
    for tool in start.tools
    if tool.description.startswith("Lists")
    and " of one " not in tool.description
  ]
  step = call(*_first(rng.choice(tools))) if tools else None
  seen = _leaves(json.loads(step.observation)) if step else []
  _submit(start, call, seen, rng)


def told_name(start: protocol.Start, call: Call, rng: random.Random):
  """Makes one call with a random tool and words of the text."""
  tools = [tool for tool in start.tools if tool.name != "submit_result"]
  words = start.observation.replace(",", " ").replace(".", " ").split()
  tool = rng.choice(tools)
  step = call(tool.name, _arguments(tool, words, rng))
  error = step.observation.startswith("error")
  seen = words if error else _leaves(json.loads(step.observation))
  _submit(start, call, seen, rng)


def searcher(start: protocol.Start, call: Call, rng: random.Random):
  """Reads the task, gathers rows through the tools, and answers.

  It is careless on purpose: in each attempt it may miss a condition or a row,
  and it samples where there is much to choose from. What it never solves in a
  hundred attempts is beyond what its reading and searching can do.
  """
  task = reading.read(start)
  if isinstance(task, reading.TripTask):
    answer = searching.plan_trip(task, call, rng)
  elif task is None:
    answer = None
  else:
    answer = searching.answer(task, call, rng)
  if answer is None:
    _submit(start, call, [], rng)
  else:
    call("submit_result", {"answer_text": json.dumps(answer)})


def planner(start: protocol.Start, call: Call, rng: random.Random):
  """Explores by types and answers what is true of some thing; see planning."""
  notes = planning.explore(start, call, rng)
  seen = [*notes.facts, *_leaves(list(notes.facts.values()))]
  draw = lambda schema: random_value(schema, seen, rng)
  answer = notes.answer(_answer_schema(start), draw, rng)
  call("submit_result", {"answer_text": json.dumps(answer)})


BASELINES = {
  "random": random_policy,
  "planner": planner,
  "one_list": one_call,
  "one_call": told_name,
}


# Whose success may keep a task.
FILTERS = {"searcher": searcher, "planner": planner}


def _first(tool):
  return tool.name, {
    name: 1 if schema["type"] == "integer" else schema["enum"][0]
    for name, schema in tool.parameters["properties"].items()
  }


def _arguments(tool, seen, rng):
  return {
    name: random_value(schema, seen, rng)
    for name, schema in tool.parameters["properties"].items()
  }


def random_value(schema, seen, rng):
  """Draws a value of a plain schema, of what was seen where that fits.

  Args:
    schema: JSON schema of type, properties, items and enum.
    seen: values to draw from.
    rng: source of choices.
  """
  if "enum" in schema:
    return rng.choice(schema["enum"])
  if schema["type"] == "boolean":
    return rng.random() < 0.5
  if schema["type"] == "object":
    return {
      name: random_value(inner, seen, rng)
      for name, inner in schema.get("properties", {}).items()
    }
  if schema["type"] == "array":
    number = rng.randint(1, 3)
    return [random_value(schema["items"], seen, rng) for _ in range(number)]
  if schema["type"] in ("integer", "number"):
    kinds = int if schema["type"] == "integer" else (int, float)
    numbers = [v for v in seen if isinstance(v, kinds)]
    return rng.choice(numbers) if numbers else rng.randint(1, 20)
  texts = [value for value in seen if isinstance(value, str)]
  return rng.choice(texts) if texts else "unknown"


def _submit(start, call, seen, rng):
  answer = random_value(_answer_schema(start), seen, rng)
  call("submit_result", {"answer_text": json.dumps(answer)})


def _answer_schema(start):
  text = start.observation
  return json.loads(text[text.index("schema: ") + len("schema: ") :])


def _leaves(value):
  if isinstance(value, dict):
    return [leaf for inner in value.values() for leaf in _leaves(inner)]
  if isinstance(value, list):
    return [leaf for inner in value for leaf in _leaves(inner)]
  return [value]
