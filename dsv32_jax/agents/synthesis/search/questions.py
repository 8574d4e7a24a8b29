"""A question as a chain: clues to a class, hops to another, what to ask there.

`write` puts a chain into words and `parse` reads it from them, so that whoever
answers sees words alone. Breadth is the number of clues, depth that of hops.
"""

from collections.abc import Sequence
import dataclasses
import re

from dsv32_jax.agents.synthesis.search import reading

CLUES = {
  "method": "has a method `{0}`",
  "parameter": "has a method with a parameter `{0}`",
  "word": "has the word `{0}` in its description",
  "methods": "documents exactly {0} methods",
}
HOPS = {
  "base": "Take the class that it inherits from directly.",
  "child": "Take the only class that inherits from it directly.",
  "sibling": "Take the other class of its module that has a method `{0}`.",
}
ASKS = {
  "default": "What is the default of the parameter `{1}` of its method `{0}`?",
  "last": "What is the last parameter of its method `{0}`?",
  "taking": "Which of its methods takes a parameter `{0}`?",
  "module": "Which module defines it?",
}
_OPENING = "In the standard library of Python one class "


@dataclasses.dataclass(frozen=True, order=True)
class Part:
  """A clue, a hop or what is asked.

  Attributes:
    kind: a key of CLUES, HOPS or ASKS.
    values: that its text names.
  """

  kind: str
  values: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
  """A question without its words."""

  clues: tuple[Part, ...]
  hops: tuple[Part, ...]
  ask: Part


def write(chain: Chain) -> str:
  """Returns the question in words."""
  *first, last = [CLUES[x.kind].format(*x.values) for x in chain.clues]
  clues = f"{', '.join(first)} and {last}" if first else last
  sentences = [
    f"{_OPENING}{clues}.",
    *(HOPS[hop.kind].format(*hop.values) for hop in chain.hops),
    ASKS[chain.ask.kind].format(*chain.ask.values),
  ]
  return " ".join(sentences)


def parse(question: str) -> Chain:
  """Reads a question's chain.

  Raises:
    ValueError: `write` writes no such question.
  """
  rest = question.removeprefix(_OPENING)
  if rest == question:
    raise ValueError(f"{question[:80]!r} is no question of this kind")
  clues: list[Part] = []
  while not rest.startswith("."):
    rest = rest.removeprefix(", ").removeprefix(" and ")
    part, rest = _take(CLUES, rest)
    clues.append(part)
  rest = rest[1:].strip()
  hops: list[Part] = []
  while rest.startswith("Take "):
    part, rest = _take(HOPS, rest)
    hops.append(part)
    rest = rest.strip()
  ask, rest = _take(ASKS, rest)
  if rest:
    raise ValueError(f"{rest[:80]!r} follows the question")
  return Chain(clues=tuple(clues), hops=tuple(hops), ask=ask)


def _take(forms: dict[str, str], text: str) -> tuple[Part, str]:
  for kind, form in forms.items():
    # A form may name its values in another order than it lists them.
    order = [int(number) for number in re.findall(r"\{(\d)\}", form)]
    pattern = re.sub(r"\\\{\d\\\}", r"(\\w+)", re.escape(form))
    found = re.match(pattern, text)
    if found:
      values = dict(zip(order, found.groups()))
      part = Part(kind, tuple(values[n] for n in sorted(values)))
      return part, text[found.end() :]
  raise ValueError(f"{text[:80]!r} is none of {list(forms)}")


def holds(clue: Part, entity: reading.Entity) -> bool:
  """Tells if a clue is true of a class."""
  (value,) = clue.values
  if clue.kind == "method":
    return entity.function(value) is not None
  if clue.kind == "parameter":
    return any(value in x.defaults for x in entity.functions)
  if clue.kind == "word":
    return value in entity.words
  return len(entity.functions) == int(value)


def fits(clues: Sequence[Part], entity: reading.Entity) -> bool:
  """Tells if all clues are true of a class."""
  return all(holds(clue, entity) for clue in clues)


def asked(ask: Part, entity: reading.Entity) -> str | None:
  """Returns what the answer is for a class, None if it has no single one."""
  if ask.kind == "module":
    return entity.module
  if ask.kind == "taking":
    found = [x.name for x in entity.functions if ask.values[0] in x.defaults]
    return found[0] if len(found) == 1 else None
  function = entity.function(ask.values[0])
  if function is None or not function.defaults:
    return None
  if ask.kind == "last":
    return list(function.defaults)[-1] if function.whole else None
  return function.defaults.get(ask.values[1])
