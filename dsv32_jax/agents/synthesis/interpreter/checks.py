"""Whether a question can be answered without running anything."""

import functools
import random
import re

from dsv32_jax.agents.environments import interpreter
from dsv32_jax.agents.synthesis.interpreter import counting
from dsv32_jax.agents.synthesis.interpreter import data
from dsv32_jax.agents.synthesis.interpreter import problems
from dsv32_jax.agents.synthesis.interpreter import simulations

GENERATORS: tuple[problems.Generator, ...] = (
  *simulations.GENERATORS,
  *data.GENERATORS,
  *counting.GENERATORS,
)
# Steps nobody does in mind.
LEAST_WORK = 1000
_SIBLINGS = 30
_MOST_ALIKE = 0.05
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def task_of(
  problem: problems.Problem, name: str
) -> interpreter.InterpreterTask:
  """Returns the task of a problem."""
  return interpreter.InterpreterTask(
    id=name,
    kind=problem.kind,
    statement=f"{problem.statement}\n\n{INSTRUCTION}",
    files=problem.files,
    answer=problem.answer,
    tolerance=problem.tolerance,
  )


INSTRUCTION = (
  "Work it out with Python, and submit the answer alone with submit_result."
)


def reason_to_reject(problem: problems.Problem, place: int) -> str:
  """Returns why a question is too easily answered, or nothing.

  Args:
    problem: the question.
    place: of its generator in GENERATORS.
  """
  if problem.work < LEAST_WORK:
    return "too few steps lead to the answer"
  task = task_of(problem, "checked")
  if any(interpreter.accepts(task, text) for text in problem.shortcuts):
    return "a shortcut gives the answer"
  if any(interpreter.accepts(task, text) for text in cheap_guesses(problem)):
    return "the statement's numbers give the answer"
  alike = sum(interpreter.accepts(task, text) for text in siblings(place))
  if alike > _MOST_ALIKE * _SIBLINGS:
    return "questions of the kind often have this answer"
  return ""


def cheap_guesses(problem: problems.Problem) -> set[str]:
  """Returns what can be read off the statement, or added up from it."""
  found = _NUMBER.findall(problem.statement)
  values = [float(text) if "." in text else int(text) for text in found]
  total = sum(values)
  guesses = {*found, "0", "1", "-1", "0,0", str(total), str(len(values))}
  for a in values[:20]:
    for b in values[:20]:
      guesses |= {f"{a},{b}", str(a * b), str(a + b), str(a - b)}
      if isinstance(a, int) and isinstance(b, int) and b > 0:
        guesses |= {str(a // b), str(a % b)}
  return guesses


@functools.cache
def siblings(place: int) -> tuple[str, ...]:
  """Returns the answers of other questions of a generator."""
  rng = random.Random(f"siblings/{place}")
  return tuple(GENERATORS[place](rng).answer for _ in range(_SIBLINGS))
