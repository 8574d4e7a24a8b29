"""Lists of integers to sort."""

import dataclasses
import random

from dsv32_jax.verifiers.tasks import problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sorting:
  """A list in ascending or descending order.

  Attributes:
    length: numbers in a list.
    largest: the largest of them; the smallest is 0.
  """

  length: int = 5
  largest: int = 99

  def __post_init__(self):
    if self.length < 2 or self.largest < 1:
      raise ValueError(
        f"length={self.length} must be at least 2, largest={self.largest} at"
        " least 1"
      )

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws a list; two orders of the same numbers are the same problem."""
    numbers = [generator.randint(0, self.largest) for _ in range(self.length)]
    down = generator.random() < 0.5
    order = "descending" if down else "ascending"
    ordered = sorted(numbers, reverse=down)
    return problem.Problem(
      task="sorting",
      content=f"{order} {_joined(sorted(numbers))}",
      question=(
        f"Sort these numbers in {order} order: {_joined(numbers)}. Separate"
        f" them by commas. {problem.INSTRUCTION}"
      ),
      answer=_joined(ordered),
      reasoning=_insertions(numbers, down),
    )


def _joined(numbers):
  return ", ".join(map(str, numbers))


def _insertions(numbers, down):
  """Says how the list grows as each number is put in its place."""
  lines, done = [], []
  for number in numbers:
    done = sorted([*done, number], reverse=down)
    lines.append(f"With {number}: {_joined(done)}")
  return "\n".join(lines)
