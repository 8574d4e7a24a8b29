"""What a generator of questions gives, and the number sequence they share."""

from collections.abc import Callable, Iterator
import dataclasses
import random

# Of Park and Miller; a question tells it in full.
MODULUS, FACTOR = 2**31 - 1, 48271
SEQUENCE = (
  f"Let x(0) = {{seed}} and x(i+1) = {FACTOR} * x(i) mod {MODULUS}, so that"
  " x(1), x(2), ... are pseudo-random numbers."
)
# The same for a solution.
SEQUENCE_CODE = f"""def numbers(x):
  while True:
    x = x * {FACTOR} % {MODULUS}
    yield x
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A question with two ways to its answer.

  Attributes:
    kind: of question.
    statement: what is asked, the form of the answer included.
    files: that go with it.
    answer: computed by the generator.
    tolerance: of the answer, see InterpreterTask.
    solution: Python program that prints the answer, computed another way.
    work: elementary steps of the computation, about.
    shortcuts: answers of whoever does not run all of it.
  """

  kind: str
  statement: str
  answer: str
  solution: str
  work: int
  files: dict[str, str] = dataclasses.field(default_factory=dict)
  tolerance: float = 0.0
  shortcuts: tuple[str, ...] = ()


Generator = Callable[[random.Random], Problem]


def numbers(seed: int) -> Iterator[int]:
  """Yields x(1), x(2), ... of SEQUENCE."""
  value = seed
  while True:
    value = value * FACTOR % MODULUS
    yield value


def draw_seed(rng: random.Random) -> int:
  """Draws x(0)."""
  return rng.randrange(1, MODULUS)
