"""Integer expressions of +, - and *, with brackets."""

import dataclasses
import random

from dsv32_jax.verifiers.tasks import problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
  """The value of a random expression.

  Attributes:
    terms: numbers in it.
    largest: the largest of them; the smallest is 0.
  """

  terms: int = 3
  largest: int = 20

  def __post_init__(self):
    if self.terms < 2 or self.largest < 1:
      raise ValueError(
        f"terms={self.terms} must be at least 2, largest={self.largest} at"
        " least 1"
      )

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws an expression; with sides of + or * swapped it is the same."""
    steps: list[str] = []
    text, content, value = self._expression(self.terms, generator, steps)
    return problem.Problem(
      task="arithmetic",
      content=content,
      question=f"What is {text}? {problem.INSTRUCTION}",
      answer=str(value),
      reasoning="\n".join(steps),
    )

  def _expression(self, terms, generator, steps):
    if terms == 1:
      value = generator.randint(0, self.largest)
      return str(value), str(value), value
    left_terms = generator.randint(1, terms - 1)
    sides = [
      self._expression(count, generator, steps)
      for count in (left_terms, terms - left_terms)
    ]
    (left_text, left_content, left), (right_text, right_content, right) = sides
    sign = generator.choice("+-*")
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    steps.append(f"{left} {sign} {right} = {value}")
    text = f"{_bracketed(left_text)} {sign} {_bracketed(right_text)}"
    return text, content_of(left_content, sign, right_content), value


def content_of(left: str, sign: str, right: str) -> str:
  """Of an expression with these sides: with those of + or * in an order."""
  contents = [_bracketed(left), _bracketed(right)]
  if sign != "-":
    contents.sort()
  return f" {sign} ".join(contents)


def _bracketed(text):
  return text if text.isdigit() else f"({text})"
