"""Who speaks the truth: knights always do, knaves never."""

import dataclasses
import itertools
import random

from dsv32_jax.verifiers.tasks import problem

_NAMES = ("A", "B", "C", "D", "E", "F")
_KINDS = ("knave", "knight")
# Statements about two people, and when they hold.
_PAIRS = {
  "{0} and {1} are of the same kind": lambda one, other: one == other,
  "{0} and {1} are of different kinds": lambda one, other: one != other,
  "at least one of {0} and {1} is a knight": lambda one, other: one or other,
  "{0} and {1} are both knaves": lambda one, other: not (one or other),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knights:
  """Each of some people says something; only one answer is consistent.

  Attributes:
    people: from 2 to 6.
  """

  people: int = 3

  def __post_init__(self):
    if not 2 <= self.people <= len(_NAMES):
      raise ValueError(f"people={self.people} must be 2 to {len(_NAMES)}")

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws statements until they have exactly one consistent answer."""
    while True:
      statements = [
        self._statement(speaker, generator) for speaker in range(self.people)
      ]
      found = [w for w in self._worlds() if _consistent(w, statements)]
      if len(found) == 1:
        return self._problem(statements, found[0])

  def _worlds(self):
    return itertools.product((False, True), repeat=self.people)

  def _statement(self, speaker, generator):
    """Text and meaning, a function of who is a knight."""
    others = [p for p in range(self.people) if p != speaker]
    if generator.random() < 0.4:
      who, kind = generator.choice(others), generator.random() < 0.5
      text = f"{_NAMES[who]} is a {_KINDS[kind]}"
      return text, lambda world: world[who] == kind
    one, other = sorted(generator.sample(range(self.people), 2))
    form = generator.choice(list(_PAIRS))
    text = form.format(_NAMES[one], _NAMES[other])
    return text, lambda world: _PAIRS[form](world[one], world[other])

  def _problem(self, statements, truth):
    names = _NAMES[: self.people]
    said = " ".join(
      f'{name} says: "{text}."' for name, (text, _) in zip(names, statements)
    )
    return problem.Problem(
      task="knights",
      content=said,
      question=(
        "Each person is a knight, who always tells the truth, or a knave, who"
        f" always lies. {said} Who is what? Answer in the form"
        f" {', '.join(f'{name}: knight' for name in names)}, with knave where"
        f" it applies. {problem.INSTRUCTION}"
      ),
      answer=_described(truth),
      reasoning="\n".join(self._trials(statements)),
    )

  def _trials(self, statements):
    """Tries every assignment and says where the first contradiction is."""
    for world in self._worlds():
      wrong = [
        name
        for name, knight, (_, holds) in zip(_NAMES, world, statements)
        if bool(holds(world)) != knight
      ]
      verdict = f"no, {wrong[0]} contradicts it" if wrong else "consistent"
      yield f"{_described(world)}: {verdict}"


def _consistent(world, statements):
  return all(bool(h(world)) == w for w, (_, h) in zip(world, statements))


def _described(world):
  return ", ".join(
    f"{name}: {_KINDS[knight]}" for name, knight in zip(_NAMES, world)
  )
