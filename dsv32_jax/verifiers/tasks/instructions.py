"""Instructions on how to write some words, each of them checked by a rule."""

from collections.abc import Callable
import dataclasses
import random
from typing import ClassVar

from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import score as score_lib
from dsv32_jax.verifiers.tasks import problem

_TEXT = (
  "apple bread chair drum earth field glass honey iron jacket king lamp moon"
  " night ocean paper queen river stone table uncle voice water year zebra"
  " arrow bridge cloud door engine flower garden house island juice kitchen"
  " letter mirror needle orange pencil quilt rabbit summer tower village"
  " window yellow"
)
WORDS = tuple(_TEXT.split())
_SEPARATORS = {"spaces": " ", "commas": ",", "dashes": "-", "slashes": "/"}
_CASES: dict[str, Callable[[str], str]] = {
  "in capital letters": str.upper,
  "with capital first letters": str.capitalize,
  "in small letters": str.lower,
}
_ORDERS = {
  "in alphabetical order": False,
  "in reverse alphabetical order": True,
}
_ENDINGS = ("", "!", "?", ".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """What holds of an answer; words are told apart without their case.

  Attributes:
    words: that may be used, each once.
    count: of words in the answer.
    without: a word that must not be in it.
    case: a key of what letters look like.
    order: "" for any.
    separator: what stands between two words.
    ending: of the answer, "" for none.
  """

  words: tuple[str, ...]
  count: int
  without: str
  case: str
  order: str
  separator: str
  ending: str

  def broken(self, text: str) -> list[str]:
    """Names the rules that a text does not keep."""
    body = text.strip().removesuffix(self.ending)
    parts = [x.strip() for x in body.split(_SEPARATORS[self.separator])]
    lower = [part.lower() for part in parts]
    reverse = _ORDERS.get(self.order)
    holds = {
      "words": len(set(lower)) == len(lower) and set(lower) <= set(self.words),
      "count": len(parts) == self.count,
      "without": self.without not in lower,
      # Some letters beyond ASCII have one of the words' as their small form.
      "case": all(
        part.isascii() and part == _CASES[self.case](part) for part in parts
      ),
      "order": reverse is None or lower == sorted(lower, reverse=reverse),
      "ending": text.strip().endswith(self.ending),
    }
    return [name for name, kept in holds.items() if not kept]

  def request(self) -> str:
    """The rules in words."""
    order = f"{self.order}, " if self.order else ""
    ending = f", with {self.ending} at the end" if self.ending else ""
    return (
      f"Write {self.count} of the words {', '.join(self.words)}, but not"
      f" {self.without}, {self.case}, {order}separated by {self.separator}"
      f"{ending}."
    )

  def solution(self) -> list[str]:
    """An answer, as it comes about: chosen, ordered, written."""
    left = [one for one in self.words if one != self.without]
    chosen = left[: self.count]
    ordered = chosen
    if self.order:
      ordered = sorted(chosen, reverse=_ORDERS[self.order])
    between = _SEPARATORS[self.separator]
    written = between.join(map(_CASES[self.case], ordered)) + self.ending
    return [" ".join(chosen), " ".join(ordered), written]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionProblem(problem.Problem):
  """Something to write; whatever keeps the rules is right.

  Attributes:
    rules: that are checked.
  """

  boxed: ClassVar[bool] = False

  rules: Rules

  def score(self, response: str) -> score_lib.Score:
    """1 if the answer behind the thinking keeps every rule."""
    broken = self.rules.broken(format_lib.answer_part(response))
    return score_lib.Score(value=float(not broken))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions:
  """Some of the given words, in a form that is asked for.

  Attributes:
    size: words given.
    largest: how many different words there are.
  """

  size: int = 3
  largest: int = 24

  def __post_init__(self):
    if not 2 <= self.size <= self.largest <= len(WORDS):
      raise ValueError(
        f"size={self.size} must be at least 2 and at most"
        f" largest={self.largest}, that at most {len(WORDS)}"
      )

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws rules; those that the same answers keep are the same.

    Words may be given in any order; to one word, order and separator mean
    nothing.
    """
    words = tuple(generator.sample(WORDS[: self.largest], self.size))
    rules = Rules(
      words=words,
      count=generator.randint(1, self.size - 1),
      without=generator.choice(words),
      case=generator.choice(list(_CASES)),
      order=generator.choice(["", *_ORDERS]),
      separator=generator.choice(list(_SEPARATORS)),
      ending=generator.choice(_ENDINGS),
    )
    same = dataclasses.replace(rules, words=tuple(sorted(words)))
    if rules.count == 1:
      same = dataclasses.replace(same, order="", separator="spaces")
    *steps, written = rules.solution()
    return InstructionProblem(
      task="instructions",
      content=same.request(),
      question=rules.request(),
      answer=written,
      reasoning="\n".join(steps),
      rules=rules,
    )
