"""The documentation that ships with Python as a corpus, with no network.

A document for each topic of `help()`, and for each module, class and public
function of the standard library, written from docstrings and signatures. The
source files are parsed, never imported, so nothing runs; what is built in has
its text from the running interpreter. The form is regular: `reading.py` reads
it back.
"""

import ast
import builtins
from collections.abc import Iterable, Iterator, Sequence
import inspect
import pathlib
import pydoc_data.topics
import sysconfig
from typing import NamedTuple

from dsv32_jax.agents.environments import search_index

# Tests, programs, and what is not for users.
_SKIPPED = ("site-packages", "test", "tests", "idlelib", "turtledemo")
_SKIPPED += ("lib2to3", "ensurepip", "pydoc_data", "__phello__", "idle_test")


class Method(NamedTuple):
  """A function or method: its name, its parameters as source, its docstring."""

  name: str
  parameters: str
  text: str


def documents(
  root: pathlib.Path | None = None, modules: Sequence[str] = ()
) -> Iterator[search_index.Document]:
  """Yields the documents, built-in classes and topics first.

  Args:
    root: folder of a library's source files; None for the standard library
      with the topics.
    modules: top-level names of the modules to take; none for all.
  """
  yield from _built_ins()
  if root is None:
    yield from _topics()
  root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
  for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    if any(x in _SKIPPED or "-" in x or x.startswith("_") for x in parts[:-1]):
      continue
    if parts[-1] == "__init__":
      parts = parts[:-1]
    if not parts or parts[-1].startswith("_") or parts[-1] in _SKIPPED:
      continue
    if modules and parts[0] not in modules:
      continue
    try:
      tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # a template, or another encoding
      continue
    yield from _module(".".join(parts), tree, path.name == "__init__.py")


def class_document(
  module: str,
  label: str,
  bases: Iterable[str],
  text: str,
  methods: Iterable[Method],
) -> search_index.Document:
  """Writes a class down."""
  lines = [
    f"Class {label} of module {module}",
    "",
    f"Base classes: {', '.join(bases) or 'builtins.object'}",
    "",
  ]
  lines += [text, ""] if text else []
  lines += ["Methods:"]
  for method in methods:
    lines += _described(method)
  return search_index.Document(
    name=f"{module}.{label}", title=lines[0], text="\n".join(lines) + "\n"
  )


def _described(function: Method) -> list[str]:
  lines = [f"  {function.name}({function.parameters})"]
  return lines + [f"    {line}" for line in function.text.splitlines()]


def _topics():
  for name, text in sorted(pydoc_data.topics.topics.items()):
    title = f"Python language topic: {name}"
    yield search_index.Document(
      name=f"topic:{name}", title=title, text=f"{title}\n\n{text}"
    )


def _built_ins():
  for label, value in sorted(vars(builtins).items()):
    if not isinstance(value, type) or value.__name__ != label:
      continue
    methods = []
    for name in sorted(x for x in vars(value) if not x.startswith("_")):
      member = getattr(value, name)  # bound, where it is the class's
      if not callable(member):
        continue
      try:
        parameters = str(inspect.signature(member))[1:-1]
      except ValueError:  # written in C without a signature
        parameters = "..."
      methods.append(Method(name, parameters, inspect.getdoc(member) or ""))
    bases = [f"builtins.{base.__name__}" for base in value.__bases__]
    text = inspect.getdoc(value) or ""
    yield class_document("builtins", label, bases, text, methods)


def _module(name: str, tree: ast.Module, is_package: bool):
  """Yields a module's own document, and those of what it defines."""
  known = _imports(name, tree, is_package)
  classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
  known |= {node.name: f"{name}.{node.name}" for node in classes}
  functions = [_method(n) for n in tree.body if _is_public_function(n)]
  lines = [f"Module {name}", ""]
  lines += [ast.get_docstring(tree) or "", ""]
  lines += ["Classes:", *(f"  {node.name}" for node in classes)]
  lines += ["Functions:", *(f"  {f.name}({f.parameters})" for f in functions)]
  yield search_index.Document(
    name=name, title=lines[0], text="\n".join(lines) + "\n"
  )
  seen = {name}
  for node in classes:
    if f"{name}.{node.name}" in seen:  # defined again for another system
      continue
    seen.add(f"{name}.{node.name}")
    methods = {n.name: _method(n) for n in node.body if _is_public_function(n)}
    bases = [_qualified(base, known) for base in node.bases]
    text = ast.get_docstring(node) or ""
    yield class_document(name, node.name, bases, text, methods.values())
  for function in functions:
    full_name = f"{name}.{function.name}"
    if function.text and full_name not in seen:
      seen.add(full_name)
      title = f"Function {function.name} of module {name}"
      text = "\n".join([title, "", *_described(function)]) + "\n"
      yield search_index.Document(name=full_name, title=title, text=text)


def _is_public_function(node: ast.AST) -> bool:
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  if not isinstance(node, kinds):
    return False
  # Properties are no methods, whatever sets them.
  decorators = {ast.unparse(x).split(".")[-1] for x in node.decorator_list}
  if decorators & {"property", "cached_property", "setter", "deleter"}:
    return False
  return node.name == "__init__" or not node.name.startswith("_")


def _method(node) -> Method:
  return Method(
    node.name, ast.unparse(node.args), ast.get_docstring(node) or ""
  )


def _imports(name: str, tree: ast.Module, is_package: bool) -> dict[str, str]:
  """Returns what each imported name of a module stands for."""
  known = {}
  for node in tree.body:
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.asname:
          known[alias.asname] = alias.name
        else:
          top = alias.name.split(".")[0]
          known[top] = top
    elif isinstance(node, ast.ImportFrom):
      parts = name.split(".")
      up = node.level - is_package
      above = parts[: len(parts) - up] if node.level else []
      where = ".".join([*above, *([node.module] if node.module else [])])
      for alias in node.names:
        known[alias.asname or alias.name] = f"{where}.{alias.name}"
  return known


def _qualified(base: ast.expr, known: dict[str, str]) -> str:
  """Returns the full name of a base class as far as the module tells it."""
  text = ast.unparse(base)
  first, dot, rest = text.partition(".")
  if first in known:
    return known[first] + dot + rest
  if not dot and hasattr(builtins, text):
    return f"builtins.{text}"
  return text
