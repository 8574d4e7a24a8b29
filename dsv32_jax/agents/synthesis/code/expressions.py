"""Small functions of three integers: said in words, written in Python.

A function is a chain of steps, each on the value of the one before. Two are the
same if they return the same on fixed probes, however they are written.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import random

ARGUMENTS = ("a", "b", "c")
_RANGE = 30
_NUM_CASES = 24

Case = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """What a step does.

  Attributes:
    words: of a later step, with the operand as {}.
    first: of the first step, with both operands.
    python: of both operands; a call needs no brackets around it.
    least: constant that it may have as its operand.
  """

  words: str
  first: str
  python: str
  least: int = 1

  @property
  def is_call(self) -> bool:
    return self.python.endswith(")")

  def value(self, left: int, right: int) -> int:
    return _VALUES[self.python](left, right)


_VALUES = {
  "{} + {}": lambda left, right: left + right,
  "{} - {}": lambda left, right: left - right,
  "{} * {}": lambda left, right: left * right,
  "{} // {}": lambda left, right: left // right,
  "{} % {}": lambda left, right: left % right,
  "max({}, {})": max,
  "min({}, {})": min,
}
_ADD = Operation(words="add {}", first="add {} and {}", python="{} + {}")
_SUBTRACT = Operation(
  words="subtract {}", first="from {} subtract {}", python="{} - {}"
)
_MULTIPLY = Operation(
  words="multiply by {}",
  first="multiply {} by {}",
  python="{} * {}",
  least=2,
)
_LARGER = Operation(
  words="take at least {}",
  first="take the larger of {} and {}",
  python="max({}, {})",
)
_SMALLER = Operation(
  words="take at most {}",
  first="take the smaller of {} and {}",
  python="min({}, {})",
)
_DIVIDE = Operation(
  words="divide by {} rounding down", first="", python="{} // {}", least=2
)
_REMAINDER = Operation(
  words="take the remainder by {}", first="", python="{} % {}", least=2
)
_FIRST = (_ADD, _SUBTRACT, _MULTIPLY, _LARGER, _SMALLER)
_LATER = (*_FIRST, _DIVIDE, _REMAINDER)
# Of no meaning with an argument as the operand: it may be 0.
_BY_CONSTANTS = (_DIVIDE, _REMAINDER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """An operation and its operands: names, constants, or None for the value."""

  operation: Operation
  left: str | None
  right: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
  """A chain of steps."""

  steps: tuple[Step, ...]

  def words(self) -> str:
    """Says what it returns."""
    first, *later = self.steps
    said = [first.operation.first.format(first.left, first.right)]
    said += [one.operation.words.format(one.right) for one in later]
    return ", then ".join(said)

  def python(self) -> str:
    """The expression that it is."""
    return self.growth()[-1]

  def growth(self) -> list[str]:
    """The expression after each step."""
    found, is_call = [], True
    for step in self.steps:
      left = step.left
      if left is None:
        bare = is_call or step.operation.is_call
        left = found[-1] if bare else f"({found[-1]})"
      found.append(step.operation.python.format(left, step.right))
      is_call = step.operation.is_call
    return found

  def value(self, case: Case) -> int:
    """What it returns, computed without running Python text."""
    value, given = 0, dict(zip(ARGUMENTS, case))
    for step in self.steps:
      left = value if step.left is None else _operand(step.left, given)
      value = step.operation.value(left, _operand(step.right, given))
    return value

  def fingerprint(self) -> str:
    """The same for functions that return the same on the probes."""
    values = " ".join(str(self.value(case)) for case in _PROBES)
    return hashlib.blake2b(values.encode(), digest_size=8).hexdigest()


def _operand(text, given):
  return given[text] if text in given else int(text)


def draw(size: int, largest: int, generator: random.Random) -> Function:
  """Draws a function.

  Args:
    size: steps.
    largest: constant in it.
    generator: source of choices.
  """
  left, right = generator.sample(ARGUMENTS, 2)
  steps = [
    Step(operation=generator.choice(_FIRST), left=left, right=right),
    *(_later(largest, generator) for _ in range(size - 1)),
  ]
  return Function(steps=tuple(steps))


def _later(largest, generator):
  operation = generator.choice(_LATER)
  if operation in _BY_CONSTANTS or generator.random() < 0.5:
    right = str(generator.randint(operation.least, largest))
  else:
    right = generator.choice(ARGUMENTS)
  return Step(operation=operation, left=None, right=right)


def altered(
  function: Function, largest: int, generator: random.Random
) -> Function:
  """Draws a function with another operation or operand in one of its steps.

  It may still return the same: compare fingerprints.
  """
  place = generator.randrange(len(function.steps))
  step, steps = function.steps[place], list(function.steps)
  others = [one for one in _possible(step) if one != step.operation]
  if others and generator.random() < 0.5:
    step = dataclasses.replace(step, operation=generator.choice(others))
  elif step.right.isdigit():
    least = step.operation.least
    right = str(generator.randint(least, max(least, largest)))
    step = dataclasses.replace(step, right=right)
  else:
    names = [one for one in ARGUMENTS if one not in (step.left, step.right)]
    step = dataclasses.replace(step, right=generator.choice(names))
  steps[place] = step
  return Function(steps=tuple(steps))


def _possible(step):
  """Operations that a step may have with its operands."""
  if step.left is not None:
    return _FIRST
  if step.right.isdigit():
    return [one for one in _LATER if one.least <= int(step.right)]
  return [one for one in _LATER if one not in _BY_CONSTANTS]


def cases(seed: int | str, count: int = _NUM_CASES) -> list[Case]:
  """Arguments to try a function on, the same for the same seed."""
  generator = random.Random(seed)
  return [
    tuple(generator.randint(-_RANGE, _RANGE) for _ in ARGUMENTS)
    for _ in range(count)
  ]


_PROBES = cases("probes", 48)


def agrees(values: Sequence[object], wanted: Sequence[int]) -> bool:
  """Tells whether untrusted values are these integers, true ones."""
  return len(values) == len(wanted) and all(
    type(one) is int and one == other for one, other in zip(values, wanted)
  )
