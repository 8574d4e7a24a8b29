"""Functions of three integers to write in Python, tested by running them."""

import dataclasses
import random

from dsv32_jax.agents.sandbox import functions
from dsv32_jax.agents.synthesis.code import expressions
from dsv32_jax.verifiers import format as format_lib
from dsv32_jax.verifiers import score as score_lib
from dsv32_jax.verifiers.tasks import problem

_NAME = "f"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramProblem(problem.Problem):
  """A program to write; one of many right ones is the answer.

  Attributes:
    tests: arguments that it is tried on, and what it has to return.
  """

  tests: tuple[tuple[expressions.Case, int], ...]

  def score(self, response: str) -> score_lib.Score:
    """1 if the boxed function returns what it has to, tried in a sandbox.

    Raises:
      SandboxError: this machine offers no sandbox.
      RuntimeError: the program hangs, crashes or floods its process.
    """
    program = format_lib.last_boxed(format_lib.answer_part(response))
    if program is None:
      return score_lib.Score(value=0.0, error="no boxed answer")
    outputs = functions.shared().call(
      f"{_NAME} = {program.strip()}", _NAME, [case for case, _ in self.tests]
    )
    if outputs.ended:
      raise RuntimeError(outputs.error)
    if outputs.values is None:
      return score_lib.Score(value=0.0, error=outputs.error)
    wanted = [value for _, value in self.tests]
    return score_lib.Score(
      value=float(expressions.agrees(outputs.values, wanted))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  """A function of a, b and c that is described in words.

  Attributes:
    size: steps of the description.
    largest: constant in it; the smallest is 1.
  """

  size: int = 2
  largest: int = 9

  def __post_init__(self):
    if self.size < 1 or self.largest < 2:
      raise ValueError(
        f"size={self.size} must be at least 1, largest={self.largest} at"
        " least 2"
      )

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws a function; those that return the same are the same problem.

    Raises:
      SandboxError: this machine offers no sandbox to try answers in.
    """
    functions.shared()
    function = expressions.draw(self.size, self.largest, generator)
    content = function.fingerprint()
    return ProgramProblem(
      task="programs",
      content=content,
      question=(
        f"Write a Python lambda of a, b and c: {function.words()}."
        f" {problem.INSTRUCTION}"
      ),
      answer=f"lambda a, b, c: {function.python()}",
      reasoning="\n".join(function.growth()),
      tests=tuple(
        (case, function.value(case)) for case in expressions.cases(content)
      ),
    )
