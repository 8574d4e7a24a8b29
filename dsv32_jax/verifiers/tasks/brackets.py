"""Openings of brackets whose closings are asked for."""

import dataclasses
import random

from dsv32_jax.verifiers.tasks import problem

# Braces would end the box of the answer.
_CLOSING = {"(": ")", "[": "]", "<": ">"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brackets:
  """The only way to close an open sequence of brackets.

  Attributes:
    length: brackets given.
  """

  length: int = 10

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f"length={self.length} must be positive")

  def draw(self, generator: random.Random) -> problem.Problem:
    """Draws a sequence that leaves at least one bracket open."""
    text, stack, steps = "", [], []
    for place in range(self.length):
      # The last bracket opens where nothing else would be left open.
      close = len(stack) > (place == self.length - 1)
      if close and generator.random() < 0.5:
        text += _CLOSING[stack.pop()]
      else:
        stack.append(generator.choice(list(_CLOSING)))
        text += stack[-1]
      steps.append(f"{text[-1]} leaves open: {' '.join(stack) or 'nothing'}")
    return problem.Problem(
      task="brackets",
      content=text,
      question=(
        f"Complete the brackets so that all are closed: {text} Answer with"
        f" the missing brackets only. {problem.INSTRUCTION}"
      ),
      answer="".join(_CLOSING[bracket] for bracket in reversed(stack)),
      reasoning="\n".join(steps),
    )
