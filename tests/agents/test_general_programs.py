"""What a solution or a verifier may do, and what is refused unrun."""

import pytest

from dsv32_jax.agents.environments import general
from dsv32_jax.agents.synthesis.general import programs
from dsv32_jax.agents.synthesis.general import propose
from dsv32_jax.agents.synthesis.general import tasks
from tests.support import general_world as world


@pytest.mark.parametrize(
  ("body", "told"),
  [
    ("import os", "Import"),
    ("from os import path", "Import"),
    ("return open('x')", "'open'"),
    ("return eval('1')", "'eval'"),
    ("return __import__('os')", "underscore"),
    ("return get.__globals__", "underscore"),
    ("return ''.format(get)", "'format'"),
    ("return (lambda: 0).func_code", "'func_code'"),
    ("return get()._x", "underscore"),
    ("return getattr(get, 'x')", "'getattr'"),
    ("return f'{get()}'", "JoinedStr"),
    ("global x\n  x = 1", "Global"),
    ("with get() as x:\n    pass", "With"),
    ("try:\n    pass\n  except:\n    pass", "Try"),
    ("raise get()", "Raise"),
    ("class A:\n    pass", "ClassDef"),
    ("del get", "Del"),
    ("yield 1", "Yield"),
    ("get = 1", "redefine 'get'"),
    ("sorted = 1", "redefine 'sorted'"),
    ("return other()", "'other'"),
    ("return connection", "'connection'"),
    ("match get():\n    case x:\n      pass", "Match"),
    ("return (x := 1)", "NamedExpr"),
    ("return (", "no Python"),
  ],
)
def test_refused(body, told):
  with pytest.raises(ValueError, match=told) as error:
    programs.check(f"def solve():\n  {body}\n", "solve", 0, {"get"})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "source",
  [
    "x = 1",
    "def other():\n  return 1\n",
    "def solve(a):\n  return 1\n",
    "def solve():\n  return 1\nsolve()\n",
    "",
    "(" * 100_000,
    "def solve():\n  \x00",
  ],
)
def test_no_single_function(source):
  with pytest.raises(ValueError):
    programs.check(source, "solve", 0, ())


def test_allowed_and_run():
  source = """def solve():
  def double(n):
    return 2 * n
  found = []
  for n in get(limit=4):
    if n % 2 == 1 or not found:
      found.append(double(n))
  best = sorted(found, key=lambda n: -n)
  return {"best": best[0], "all": [n for n in best], "sum": sum(found)}
"""
  programs.check(source, "solve", 0, {"get"})
  solve = programs.load(source, "solve", {"get": lambda limit: [*range(limit)]})
  assert solve() == {"best": 6, "all": [6, 2, 0], "sum": 8}


def test_solutions_use_nothing_but_tools():
  for record, task in world.tasks("find", "bundle", "trip"):
    names = {tool["name"] for tool in record["tools"]} - {"submit_result"}
    programs.check(task["solution"], "solve", 0, names)
    with pytest.raises(ValueError, match="neither a tool nor"):
      programs.check(task["solution"], "solve", 0, {"another_tool"})
    programs.check(task["verifier"], "verify", 1, {"query"})


def draft(record, task, **changes):
  fields = {
    "kind": task["kind"],
    "statement": task["statement"],
    "answer_schema": task["answer_schema"],
    "solution": task["solution"],
    "verifier": task["verifier"],
    "wrong_answers": task["wrong_answers"],
  }
  return tasks.Draft(**fields | changes)


class _Toolset:
  """The tools of a record, as the pipeline's world holds them."""

  def __init__(self, record):
    self._record = record

  def specs(self):
    load = general.tool_specs.ToolSpec.load
    return [load(spec) for spec in self._record["tools"]]


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"verifier": "def verify(answer):\n  return False\n"}, "refuses"),
    ({"verifier": "def verify(answer):\n  return True\n"}, "accepts a wrong"),
    ({"solution": "def solve():\n  return None\n"}, "no answer"),
    ({"solution": "def solve():\n  return [1]\n"}, "refuses"),
    ({"wrong_answers": []}, "only 0 wrong"),
    ({"wrong_answers": [[1]] * 5}, "not well formed"),
  ],
)
def test_a_draft_that_does_not_hold_is_rejected(changes, told):
  record, task = world.tasks("find")[0]
  connection = general.GeneralEnvironment(record, task).connection
  held = propose.World(
    data=None, toolset=_Toolset(record), connection=connection
  )
  accepted = propose.accept(held, draft(record, task))
  assert accepted["answer"] == task["answer"]
  with pytest.raises(tasks.Rejection, match=told):
    propose.accept(held, draft(record, task, **changes))
