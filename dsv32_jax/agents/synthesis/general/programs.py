"""Solutions and verifiers: Python that may only call what it is given.

A solution is `def solve():` over the environment's tools and returns an
answer. A verifier is `def verify(answer):` over `query(sql, *values)`, which
reads the database behind the tools, and returns a bool. Both are checked
before they run: no import, no attribute but a few methods of lists, dicts and
strings, no name but tools, builtins that compute, and own variables.

The check bounds what a program can reach, not how long it runs: what a model
wrote belongs into the sandbox besides.
"""

import ast
from collections.abc import Callable, Mapping
import functools
from typing import Any

_METHOD_NAMES = (
  "append add extend pop get items keys values index count sort split join"
  " lower upper strip startswith endswith copy update"
)
METHODS = frozenset(_METHOD_NAMES.split())
BUILTINS = {
  function.__name__: function
  for function in (
    abs,
    all,
    any,
    bool,
    dict,
    enumerate,
    float,
    int,
    len,
    list,
    max,
    min,
    range,
    reversed,
    round,
    set,
    sorted,
    str,
    sum,
    tuple,
    zip,
  )
}
_ALLOWED = (
  *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Lambda),
  *(ast.Return, ast.Assign, ast.AugAssign, ast.Expr, ast.Pass),
  *(ast.For, ast.While, ast.If, ast.Break, ast.Continue, ast.IfExp),
  *(ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword),
  *(ast.Name, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set),
  *(ast.Subscript, ast.Slice, ast.Starred, ast.Attribute),
  *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
  *(ast.comprehension, ast.Load, ast.Store),
  *(ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)


def check(source: str, entry: str, arguments: int, callables) -> None:
  """Raises unless a program only computes and calls what it may.

  Args:
    source: Python with one function at the top.
    entry: name the function must have.
    arguments: how many it must take.
    callables: names that it may call besides BUILTINS and its own functions.

  Raises:
    ValueError: naming the line and what is not allowed there.
  """
  try:
    tree = ast.parse(source)
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError(f"{entry} is no Python: {error}") from error
  top = tree.body[0] if len(tree.body) == 1 else None
  if not isinstance(top, ast.FunctionDef) or top.name != entry:
    raise ValueError(f"the program must be one function {entry}")
  if len(top.args.args) != arguments:
    raise ValueError(f"{entry} must take {arguments} arguments")
  own = {
    node.name for node in ast.walk(top) if isinstance(node, ast.FunctionDef)
  }
  stored = {node.arg for node in ast.walk(top) if isinstance(node, ast.arg)} | {
    node.id
    for node in ast.walk(top)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
  }
  given = set(callables) | set(BUILTINS)
  for name in sorted((own | stored) & given):
    raise ValueError(f"{entry} must not redefine {name!r}")
  for node in ast.walk(tree):
    _check_node(node, entry, own | given, stored)


def load(source: str, entry: str, functions: Mapping[str, Callable[..., Any]]):
  """Returns the function of a program that `check` has passed."""
  namespace = {"__builtins__": dict(BUILTINS), **functions}
  exec(_compiled(source), namespace)
  return namespace[entry]


@functools.lru_cache(maxsize=4096)
def _compiled(source):
  return compile(source, "<program>", "exec")


def _check_node(node, entry, callables, stored):
  where = f"{entry} line {getattr(node, 'lineno', 0)}"
  if not isinstance(node, _ALLOWED):
    raise ValueError(f"{where}: {type(node).__name__} is not allowed")
  if isinstance(node, ast.FunctionDef) and node.decorator_list:
    raise ValueError(f"{where}: decorators are not allowed")
  names = [
    value
    for field in ("id", "name", "arg", "attr")
    if isinstance(value := getattr(node, field, None), str)
  ]
  if any(name.startswith("_") for name in names):
    raise ValueError(f"{where}: {names[0]!r} begins with an underscore")
  if isinstance(node, ast.Attribute) and node.attr not in METHODS:
    raise ValueError(f"{where}: attribute {node.attr!r} is not allowed")
  if isinstance(node, ast.Name) and node.id not in callables | stored:
    raise ValueError(f"{where}: {node.id!r} is neither a tool nor a variable")
