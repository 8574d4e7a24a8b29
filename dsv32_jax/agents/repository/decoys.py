"""Tests that have to fail, put among hidden tests before they are run.

Tests run in the process of the code they test, and that code is an agent's: it
can make a report say that everything passed, or return a value that equals
every other. Both make a decoy pass, so a run counts only where the decoys
failed. A decoy is a copy of a test with what it expects changed, under a name
like that of a test; which names are decoys never enters the sandbox. Code that
reads the tests and works out what each means can still tell them apart.
"""

import ast
from collections.abc import Callable
import copy
import random
import re
import textwrap

AddDecoys = Callable[[str, set[str], random.Random], str]
# Of copies in one file.
_MOST = 8
_ENDINGS = ("again", "also", "twice", "more", "once", "still", "anew")
_PARAMETERS = re.compile(r"\[.*\]$", re.DOTALL)


def python(text: str, names: set[str], generator: random.Random) -> str:
  """Adds decoys to a file of pytest tests, or gives it back as it is.

  Args:
    text: of the file.
    names: of tests to copy, parameters in brackets or not.
    generator: draws names and numbers.
  """
  try:
    module = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError):
    return text
  plain = {_PARAMETERS.sub("", name) for name in names}
  tests = [
    node
    for node in _functions(module)
    if node.name in plain and node.end_lineno is not None
  ]
  used = {node.name for node in _functions(module)}
  if len(tests) > _MOST:
    tests = generator.sample(tests, _MOST)
  lines = text.split("\n")
  # From the end, as each copy moves what follows it.
  for test in sorted(tests, key=lambda node: -node.end_lineno):
    copied = _changed(test)
    if copied is None:
      continue
    copied.name = _new_name(test.name, used, generator)
    body = textwrap.indent(ast.unparse(copied), " " * test.col_offset)
    lines[test.end_lineno : test.end_lineno] = ["", "", *body.split("\n")]
  name = _new_name(generator.choice(sorted(plain or {"test"})), used, generator)
  if not name.startswith("test"):
    name = f"test_{name}"
  low, high = sorted(generator.sample(range(2, 99), 2))
  wrong = f"assert sorted([{high}, {low}]) == [{high}, {low}]"
  return "\n".join([*lines, "", "", f"def {name}():", f"  {wrong}", ""])


def _functions(module):
  """Yields functions of the module and the methods of its classes."""
  for node in module.body:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node
    elif isinstance(node, ast.ClassDef):
      yield from (
        child
        for child in node.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
      )


def _new_name(name, used, generator):
  endings = list(_ENDINGS)
  generator.shuffle(endings)
  for number in range(2, 100):
    for ending in endings:
      if (new := f"{name}_{ending}") not in used:
        used.add(new)
        return new
    endings = [f"{ending}_{number}" for ending in _ENDINGS]
  raise AssertionError("no name is left")


def _changed(test):
  """Returns a copy whose last check expects something else, or None."""
  copied = copy.deepcopy(test)
  checks = [
    node
    for node in ast.walk(copied)
    if isinstance(node, ast.Assert) or _is_check_of_unittest(node)
  ]
  if not checks:
    return None
  check = max(checks, key=lambda node: node.lineno)
  if isinstance(check, ast.Assert):
    expected = check.test
    if isinstance(expected, ast.Compare) and _change_constant(
      expected.comparators[-1]
    ):
      return copied
    if _change_constant(expected):
      return copied
    check.test = ast.UnaryOp(op=ast.Not(), operand=expected)
    return copied
  return copied if any(map(_change_constant, check.args[:2][::-1])) else None


def _is_check_of_unittest(node):
  return (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr.startswith("assert")
    and isinstance(node.func.value, ast.Name)
    and node.func.value.id == "self"
  )


def _change_constant(expression) -> bool:
  """Changes the last number, text or truth value in an expression."""
  found = None
  for node in ast.walk(expression):
    if isinstance(node, ast.Constant) and isinstance(
      node.value, bool | int | float | str | bytes
    ):
      found = node
  if found is None:
    return False
  match found.value:
    case bool(value):
      found.value = not value
    case int(value) | float(value):
      found.value = value + 1
    case str(value):
      found.value = value + "x"
    case bytes(value):
      found.value = value + b"x"
  return True
