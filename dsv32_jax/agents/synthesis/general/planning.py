"""A planner that knows no task: it explores by types, and answers from facts.

It makes calls whose arguments the schemas ask for and earlier results gave,
notes what they tell about each thing, and submits an answer that is true of
one thing, or lists some: what a policy achieves that uses the tools well and
does not read what is asked. A task that it often solves asks for little.
"""

import json
import random
import re
from typing import Any

from dsv32_jax.agents.environments import protocol

_CALLS = 120
_TRIES = 20


def explore(start: protocol.Start, call, rng: random.Random) -> "Notes":
  """Returns what calls of the right types told.

  Args:
    start: of the episode.
    call: carries out a call, and returns its step.
    rng: source of choices.
  """
  notes, made = Notes(), set()
  tools = [tool for tool in start.tools if tool.name != "submit_result"]
  misses = 0
  while len(made) < _CALLS and misses < _TRIES:
    tool = rng.choice(tools)
    arguments = notes.arguments(tool, rng)
    mark = (tool.name, json.dumps(arguments, sort_keys=True))
    if arguments is None or mark in made:
      misses += 1
      continue
    misses = 0
    made.add(mark)
    step = call(tool.name, arguments)
    if step.done:
      break
    if not step.observation.startswith("error"):
      notes.add(tool, arguments, json.loads(step.observation))
  return notes


class Notes:
  """What is known.

  Attributes:
    names: of things, by kind.
    facts: of a thing by its name, its kind and name among them.
  """

  def __init__(self):
    self.names: dict[str, list[str]] = {}
    self.facts: dict[str, dict[str, Any]] = {}

  def arguments(
    self, tool: protocol.ToolSchema, rng: random.Random
  ) -> dict[str, Any] | None:
    """Draws arguments of a call, None where a name of some kind is wanting."""
    found = {}
    for name, schema in tool.parameters["properties"].items():
      kind = name.removeprefix("from_").removeprefix("to_")
      if "enum" in schema:
        found[name] = rng.choice(schema["enum"])
      elif schema["type"] == "array":
        found[name] = list(schema["items"]["enum"])
      elif schema["type"] == "integer":
        found[name] = rng.randint(1, 3)
      elif kind in self.names:
        found[name] = rng.choice(self.names[kind])
      else:
        return None
    return found

  def add(
    self, tool: protocol.ToolSchema, arguments: dict[str, Any], value: Any
  ) -> None:
    """Notes a result."""
    listed = re.match(r"Lists every (\w+)", tool.description)
    texts = {k: v for k, v in arguments.items() if isinstance(v, str)}
    if listed:
      names = value["names"] if isinstance(value, dict) else value
      for name in names:
        if name not in self.facts:
          self.names.setdefault(listed[1], []).append(name)
        known = self.facts.setdefault(name, {listed[1]: name})
        known.update(texts)
    elif len(texts) == 1:
      ((_, name),) = texts.items()
      told = re.match(r"get_(\w+)_(?:of|by)_\w+$", tool.name)
      told = {told[1] if told else tool.name: value}
      told = value if isinstance(value, dict) else told
      self.facts.setdefault(name, {}).update(told)

  def answer(self, schema: dict[str, Any], draw, rng: random.Random) -> Any:
    """Returns an answer that is true of one thing as far as is known.

    Args:
      schema: of the answer.
      draw: gives a random value of a schema.
      rng: source of choices.
    """
    if schema["type"] != "object":
      return draw(schema)
    keys = schema["properties"]
    most = 0
    best: list[dict[str, Any]] = [{}]
    for known in self.facts.values():
      count = sum(key in known for key in keys)
      if count > most:
        most, best = count, []
      if count == most:
        best.append(known)
    chosen = rng.choice(best)
    return {
      key: chosen[key]
      if _fits(chosen.get(key), inner)
      else self._list(key, draw(inner), rng)
      for key, inner in keys.items()
    }

  def _list(self, key, drawn, rng):
    """In the place of any names, names of one kind that the key speaks of."""
    kinds = [kind for kind in self.names if key.startswith(kind[:4])]
    if not isinstance(drawn, list) or not self.names:
      return drawn
    names = self.names[rng.choice(kinds or sorted(self.names))]
    return rng.sample(names, min(len(names), rng.randint(1, 4)))


def _fits(value, schema):
  kinds = {"string": str, "integer": int, "number": (int, float)}
  return isinstance(value, kinds.get(schema["type"], ()))
