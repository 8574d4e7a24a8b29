"""An endless numbered stream of problems, mixed by weight.

A problem follows from the seed and its number alone. Who works through the
stream need only remember a number to go on without losing or repeating one.
Two numbers may hold the same problem, as two epochs would.
"""

from collections.abc import Sequence
import dataclasses
import math
import random
from typing import Literal

from dsv32_jax.verifiers.tasks import arithmetic
from dsv32_jax.verifiers.tasks import brackets
from dsv32_jax.verifiers.tasks import instructions
from dsv32_jax.verifiers.tasks import knights
from dsv32_jax.verifiers.tasks import problem as problem_lib
from dsv32_jax.verifiers.tasks import programs
from dsv32_jax.verifiers.tasks import proofs
from dsv32_jax.verifiers.tasks import sorting

_MAKE = {
  "arithmetic": lambda size, largest: arithmetic.Arithmetic(
    terms=size, largest=largest
  ),
  "sorting": lambda size, largest: sorting.Sorting(
    length=size, largest=largest
  ),
  "brackets": lambda size, largest: brackets.Brackets(length=size),
  "knights": lambda size, largest: knights.Knights(people=size),
  "programs": lambda size, largest: programs.Programs(
    size=size, largest=largest
  ),
  "proofs": lambda size, largest: proofs.Proofs(terms=size, largest=largest),
  "instructions": lambda size, largest: instructions.Instructions(
    size=size, largest=largest
  ),
}
# Draws in a row outside the split at which a task counts as without one.
_PATIENCE = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
  """One task of a mixture.

  Attributes:
    kind: of the task.
    name: of its domain, in metrics and for KL weights; "": its kind.
    thinking: whether answers think first; None: as the run's reward says.
    size: terms (of a statement to prove, too), numbers, brackets or people in a
      problem, steps of a program, words of an instruction.
    largest: number that occurs; of an instruction, how many words there are; of
      no meaning to brackets and knights.
    weight: share of the problems, relative to the other tasks.
  """

  kind: Literal[
    "arithmetic",
    "sorting",
    "brackets",
    "knights",
    "programs",
    "instructions",
    "proofs",
  ]
  size: int
  largest: int = 20
  weight: float = 1.0
  name: str = ""
  thinking: bool | None = None

  def __post_init__(self):
    if not 0 < self.weight < math.inf:
      raise ValueError(f"weight={self.weight} of {self.kind} must be positive")
    self.make()

  @property
  def domain(self) -> str:
    """What its problems are counted as."""
    return self.name or self.kind

  def make(self) -> problem_lib.Task:
    """The generator.

    Raises:
      ValueError: if it cannot have this size.
    """
    return _MAKE[self.kind](self.size, self.largest)


class Mixture:
  """Problems of one split by their numbers."""

  def __init__(
    self,
    configs: Sequence[TaskConfig],
    *,
    split: Literal["train", "held_out"],
    seed: int,
  ):
    """Makes the generators.

    Raises:
      ValueError: if there is no task, or the split is unknown.
    """
    if not configs:
      raise ValueError("tasks is empty")
    if split not in ("train", "held_out"):
      raise ValueError(f"{split=} must be train or held_out")
    self._tasks = [(config, config.make()) for config in configs]
    self._weights = [config.weight for config in configs]
    self._held_out = split == "held_out"
    self._seed = seed

  def problem(self, number: int) -> problem_lib.Problem:
    """The problem of a number, the same whenever it is asked for.

    Raises:
      ValueError: if the task drawn has no problem of this split.
    """
    return self.drawn(number)[1]

  def drawn(self, number: int) -> tuple[TaskConfig, problem_lib.Problem]:
    """The problem of a number, and which task it is of.

    Raises:
      ValueError: if the task drawn has no problem of this split.
    """
    generator = random.Random(f"{self._seed}/{number}")
    ((config, task),) = generator.choices(self._tasks, self._weights)
    for _ in range(_PATIENCE):
      problem = task.draw(generator)
      if problem_lib.is_held_out(problem) == self._held_out:
        return config, problem
    raise ValueError(f"{task} has no problem with held_out={self._held_out}")
