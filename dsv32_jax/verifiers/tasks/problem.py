"""A problem, and how problems are drawn into splits that share none.

The content of a problem alone decides its split, by a hash, so that no choice
of seed or of number of problems puts a held-out one into training. Content is
what makes two problems the same to a solver, not how they are worded.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
import random
import re
from typing import Any, ClassVar, Literal, Protocol

from dsv32_jax.verifiers import exact
from dsv32_jax.verifiers import score

# One problem in so many is held out.
HELD_OUT_SHARE = 8
# Draws in a row that bring nothing new before a task counts as used up.
_PATIENCE = 2000

INSTRUCTION = "Put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A question with its answer.

  Attributes:
    task: name of the generator.
    content: what makes the problem, whatever its wording.
    question: what is asked, the form of the answer included.
    answer: the truth, as a box should hold it.
    reasoning: steps that lead there, for a supervised seed.
    boxed: whether a response holds its answer in a box.
  """

  boxed: ClassVar[bool] = True

  task: str
  content: str
  question: str
  answer: str
  reasoning: str

  def score(self, response: str) -> score.Score:
    """1 if the last boxed text behind the thinking is the answer.

    Kinds of problems that run an answer raise what keeps them from it.
    """
    # Spaces beside commas and signs are a matter of taste.
    return exact.exact_match(_tight(response), _tight(self.answer))

  def messages(self, *, thinking: bool = True) -> list[dict[str, Any]]:
    """The problem solved, as chat messages for supervised fine-tuning.

    Args:
      thinking: whether the reasoning comes before the answer, or is left out.
    """
    reasoning = {"reasoning_content": self.reasoning} if thinking else {}
    content = f"\\boxed{{{self.answer}}}" if self.boxed else self.answer
    return [
      {"role": "user", "content": self.question},
      {"role": "assistant", **reasoning, "content": content},
    ]


class Task(Protocol):
  """A generator of problems."""

  def draw(self, generator: random.Random) -> Problem:
    """Draws a problem."""
    ...


def is_held_out(problem: Problem) -> bool:
  """Tells whether a problem is for evaluation only."""
  return holds_out(key_of(problem.task, problem.content))


def key_of(task: str, content: str) -> str:
  """What decides the split of all that teaches to solve a problem.

  Args:
    task: name of the problem's generator.
    content: as of Problem.
  """
  return f"{task}\n{content}"


def holds_out(key: str) -> bool:
  """Tells whether what has this key is for evaluation only: one in eight is."""
  number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
  return number % HELD_OUT_SHARE == 0


def generate(
  task: Task, *, split: Literal["train", "held_out"], seed: int
) -> Iterator[Problem]:
  """Yields different problems of a split for as long as the task has any.

  The same seed gives the same problems in the same order.

  Raises:
    ValueError: if the split is unknown.
  """
  if split not in ("train", "held_out"):
    raise ValueError(f"{split=} must be train or held_out")
  return _generate(task, split == "held_out", random.Random(seed))


def _generate(task, held_out, generator):
  seen, since = set(), 0
  while since < _PATIENCE:
    problem = task.draw(generator)
    since += 1
    if is_held_out(problem) == held_out and problem.content not in seen:
      seen.add(problem.content)
      since = 0
      yield problem


def _tight(text: str) -> str:
  """Text without spaces beside signs; those between words and numbers stay."""
  return re.sub(r"\s*([^\w\s])\s*", r"\1", text)
