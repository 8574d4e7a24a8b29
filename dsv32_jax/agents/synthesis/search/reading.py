"""Reads a class back from its document in the corpus of `python_docs`."""

import ast
import dataclasses
import functools
import re

_TITLE = re.compile(r"Class (\w+) of module ([\w.]+)")
_MARK = "\nMethods:\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
  """A method as its document shows it.

  Attributes:
    name: of the method.
    defaults: by parameter, the source of its default or None; without self.
    whole: whether `defaults` are all parameters, no starred ones besides.
    line: of the document that says so.
  """

  name: str
  defaults: dict[str, str | None]
  whole: bool
  line: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entity:
  """A class as its document shows it.

  Attributes:
    name: of the document, module and label.
    label: of the class.
    module: that defines it.
    bases: full names as far as known.
    functions: public methods and __init__.
    words: of its own docstring, distinct, in order.
  """

  name: str
  label: str
  module: str
  bases: tuple[str, ...]
  functions: tuple[Function, ...]
  words: tuple[str, ...]

  def function(self, name: str) -> Function | None:
    """Returns the method of a name, if there is one."""
    return next((x for x in self.functions if x.name == name), None)


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Entity | None:
  """Returns the class that a document describes, or None if it is another."""
  title = _TITLE.match(text)
  before, mark, after = text.rpartition(_MARK)
  bases = re.search(r"^Base classes: (.*)$", before, re.MULTILINE)
  if not title or not mark or not bases:
    return None
  functions = tuple(
    _function(line) for line in after.splitlines() if re.match(r"  \w+\(", line)
  )
  docstring = before[bases.end() :]
  return Entity(
    name=f"{title[2]}.{title[1]}",
    label=title[1],
    module=title[2],
    bases=tuple(bases[1].split(", ")),
    functions=functions,
    words=tuple(dict.fromkeys(re.findall(r"[A-Za-z]{6,}", docstring))),
  )


def classes(text: str) -> list[str]:
  """Returns the names of the classes that a module's document lists."""
  title = re.match(r"Module ([\w.]+)", text)
  _, mark, after = text.rpartition("\nClasses:\n")
  if not title or not mark:
    return []
  labels = after.partition("Functions:")[0].split()
  return [f"{title[1]}.{label}" for label in labels]


def _function(line: str) -> Function:
  name = line.strip().partition("(")[0]
  try:
    arguments = ast.parse(f"def {line.strip()}: pass").body[0].args
  except SyntaxError:  # "...", where nothing is known
    return Function(name=name, defaults={}, whole=False, line=line)
  plain = [*arguments.posonlyargs, *arguments.args]
  before = len(plain) - len(arguments.defaults)
  defaults = {
    argument.arg: None if place < before else arguments.defaults[place - before]
    for place, argument in enumerate(plain)
  }
  for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
    defaults[argument.arg] = default
  return Function(
    name=name,
    defaults={
      name: None if value is None else ast.unparse(value)
      for name, value in defaults.items()
      if name not in ("self", "cls")
    },
    whole=arguments.vararg is None and arguments.kwarg is None,
    line=line,
  )
