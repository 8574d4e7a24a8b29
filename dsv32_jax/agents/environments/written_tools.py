"""Runs tools, solutions and verifiers that a model wrote, inside a sandbox.

A module for `sandbox.Worker`, of `read_only` and the standard library.
`world.json` in its folder has `rows` by table, `tools` with `name` and
`source`, and the names of the `builtins` that a solution or a verifier may
call; what these may do besides is checked before they come here.
"""

import builtins
import json

from dsv32_jax.agents.environments import read_only

_MOST_CALLS = 2000
with open("world.json", encoding="utf-8") as _file:
  _WORLD = json.load(_file)
_CONNECTION = read_only.connect(_WORLD["rows"])
_BUILTINS = {name: getattr(builtins, name) for name in _WORLD["builtins"]}


def _query(sql, *values):
  return [list(row) for row in _CONNECTION.execute(sql, values)]


def _loaded(tool):
  namespace = {"query": _query}
  exec(compile(tool["source"], tool["name"], "exec"), namespace)
  function = namespace.get(tool["name"])
  if not callable(function):
    raise NameError(f"the source defines no function {tool['name']}")
  return function


_TOOLS = {tool["name"]: _loaded(tool) for tool in _WORLD["tools"]}


def _by_value(value):
  return json.loads(json.dumps(value, allow_nan=False))


def call_tool(name, arguments):
  """Returns what a tool answers."""
  return _TOOLS[name](**arguments)


def solve(source):
  """Runs a solution; returns its answer and the calls it made."""
  calls = []

  def function(name):
    def run(**arguments):
      if len(calls) == _MOST_CALLS:
        raise RuntimeError(f"more than {_MOST_CALLS} tool calls")
      calls.append([name, _by_value(arguments)])
      return _by_value(_TOOLS[name](**_by_value(arguments)))

    return run

  namespace = {"__builtins__": _BUILTINS}
  namespace |= {name: function(name) for name in _TOOLS}
  exec(compile(source, "solution", "exec"), namespace)
  return {"answer": _by_value(namespace["solve"]()), "calls": calls}


def verify(source, answers):
  """Returns for each answer whether a verifier says that it is right."""
  found = []
  for answer in answers:
    namespace = {"__builtins__": _BUILTINS, "query": _query}
    exec(compile(source, "verifier", "exec"), namespace)
    found.append(namespace["verify"](_by_value(answer)) is True)
  return found
