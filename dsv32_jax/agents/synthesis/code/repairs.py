"""Draws files with a fault for `environments.repairs`, and how they are mended.

Each file holds a comment with what its function returns, and an expression that
does not in one of them.
"""

import dataclasses
import random

from dsv32_jax.agents.environments import repairs
from dsv32_jax.agents.synthesis.code import expressions

NAMES = ("area", "cost", "gain", "mean", "rate", "span")
# Of the file with the fault. Other files have one step, so that no function of
# held-out tasks stands in one of them.
_STEPS = 2

Call = tuple[str, dict[str, str], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """A task and what solves it.

  Attributes:
    task: that was drawn.
    content: of what the wrong file has to do, as `expressions` names it.
    solution: name, arguments and thought of each call.
  """

  task: repairs.RepairTask
  content: str
  solution: tuple[Call, ...]


def draw(num_files: int, largest: int, generator: random.Random) -> Drawn:
  """Draws a task.

  Args:
    num_files: up to len(NAMES).
    largest: constant in a function.
    generator: source of choices.
  """
  wanted = expressions.draw(_STEPS, largest, generator)
  broken, *others = generator.sample(NAMES, num_files)
  while True:
    written = expressions.altered(wanted, largest, generator)
    module = _module(broken, wanted, written)
    # Some changes change nothing, or nothing that the tests see.
    if not module.is_right and module.tests:
      break
  modules = [module]
  for name in others:
    function = expressions.draw(1, largest, generator)
    modules.append(_module(name, function, function))
  generator.shuffle(modules)
  content = wanted.fingerprint()
  task = repairs.RepairTask(
    id=f"repair {content}/{written.python()} {num_files}",
    modules=tuple(modules),
  )
  return Drawn(
    task=task,
    content=content,
    solution=_solution(broken, wanted, written, modules),
  )


def _module(name, wanted, written) -> repairs.Module:
  cases = expressions.cases(f"{wanted.fingerprint()} {name}")
  tests = [(case, wanted.value(case)) for case in cases]
  is_right = written == wanted
  # A test that fails, where there is one.
  shown = [one for one in tests if is_right or written.value(one[0]) != one[1]][
    :1
  ]
  return repairs.Module(
    name=name,
    text=(
      f"# {wanted.words()}\ndef {name}(a, b, c):\n  return {written.python()}\n"
    ),
    tests=tuple(shown),
    returned=tuple(written.value(case) for case, _ in shown),
    hidden=tuple(tests),
    is_right=is_right,
  )


def _solution(broken, wanted, written, modules) -> tuple[Call, ...]:
  file = f"{broken}.py"
  look = [] if len(modules) == 1 else [("run_tests", {}, "I run the tests.")]
  edit = {"file": file, "old": written.python(), "new": wanted.python()}
  return (
    *look,
    ("open", {"file": file}, f"I look at {broken}."),
    ("edit", edit, f"It has to be {wanted.python()}."),
    ("submit", {}, "It is mended."),
  )
