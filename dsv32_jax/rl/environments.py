"""Tasks that are episodes in environments, numbered as problems are.

A task follows from the seed and its number alone. What is held out is decided
by a hash of a task's content, as of `verifiers.tasks`: no choice of seed puts
a held-out task into training.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
from typing import Any, Literal

from dsv32_jax.agents.environments import calculator
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import repairs as repair_environment
from dsv32_jax.agents.synthesis.code import repairs
from dsv32_jax.agents.synthesis.general import campaign
from dsv32_jax.agents.synthesis.general import lookups
from dsv32_jax.agents.synthesis.general import solving
from dsv32_jax.agents.synthesis.search import small as searches
from dsv32_jax.rl import episode_config
from dsv32_jax.verifiers.tasks import arithmetic
from dsv32_jax.verifiers.tasks import problem as problem_lib

Split = Literal["train", "held_out"]
# Draws in a row that bring nothing of the split, or nothing new.
_PATIENCE = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
  """A call of a solution.

  Attributes:
    name: of the tool.
    arguments: of the call.
    thought: what leads to it, for solutions that think.
  """

  name: str
  arguments: dict[str, Any]
  thought: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeTask:
  """What an episode is about.

  Attributes:
    id: the same for the same task.
    key: decides its split; tasks that teach the same share it, and with them
      a problem of single answers.
    domain: for KL weights and metrics.
    thinking: whether replies think first; None: as the run's episodes do.
    make: gives the environment of one episode.
    solve: gives the calls that earn the reward.
  """

  id: str
  key: str
  domain: str
  make: Callable[[], protocol.Environment]
  solve: Callable[[], list[Action]]
  thinking: bool | None = None


class Tasks:
  """Tasks of one split by their numbers."""

  def __init__(
    self,
    configs: Sequence[episode_config.EnvironmentConfig],
    *,
    split: Split,
    seed: int,
  ):
    """Opens what is read from folders.

    Raises:
      ValueError: if there is no environment, or a folder has none.
    """
    if not configs:
      raise ValueError("episodes.environments is empty")
    self._draws = [_DRAW[config.kind](config) for config in configs]
    self._weights = [config.weight for config in configs]
    self._configs = tuple(configs)
    self._held_out = split == "held_out"
    self._seed = seed

  def task(self, number: int) -> EpisodeTask:
    """The task of a number, the same whenever it is asked for.

    Raises:
      ValueError: if the environment drawn has no task of this split.
    """
    generator = random.Random(f"{self._seed}/{number}")
    (place,) = generator.choices(range(len(self._draws)), self._weights)
    return self._drawn(place, generator)

  def different(self, count: int) -> list[EpisodeTask]:
    """So many different tasks of each environment, or all that it has."""
    found = []
    for place in range(len(self._draws)):
      generator = random.Random(f"{self._seed}/{place}/different")
      mine: dict[str, EpisodeTask] = {}
      for _ in range(100 * count):
        if len(mine) == count:
          break
        task = self._drawn(place, generator)
        mine.setdefault(task.id, task)
      found += mine.values()
    return found

  def _drawn(self, place, generator) -> EpisodeTask:
    config = self._configs[place]
    for _ in range(_PATIENCE):
      task = self._draws[place](generator)
      if problem_lib.holds_out(task.key) == self._held_out:
        return dataclasses.replace(
          task, domain=config.name or task.domain, thinking=config.thinking
        )
    raise ValueError(
      f"{config.kind} has no task with held_out={self._held_out}"
    )


def with_thoughts(calls: Sequence[tuple[str, dict[str, Any]]]) -> list[Action]:
  """Adds to each call that it is the next one, to the last that it answers."""
  actions = []
  for place, (name, arguments) in enumerate(calls, 1):
    told = ", ".join(map(str, arguments.values()))
    aim = "The answer is" if place == len(calls) else f"I {name}:"
    thought = f"{aim.replace('_', ' ')} {told}."
    actions.append(Action(name=name, arguments=arguments, thought=thought))
  return actions


def _calculator(config):
  task = arithmetic.Arithmetic(terms=config.size, largest=config.largest)

  def draw(generator):
    return _calculator_task(task.draw(generator))

  return draw


def _calculator_task(problem: problem_lib.Problem) -> EpisodeTask:
  ask = problem.question.removesuffix(problem_lib.INSTRUCTION).strip()
  one = calculator.CalculatorTask(
    id=f"calculator {problem.content}",
    question=f"{ask} Calculate step by step, then submit.",
    answer=int(problem.answer),
  )

  def solve():
    steps = [x.partition(" = ")[0] for x in problem.reasoning.splitlines()]
    calls = [("calculate", {"step": step}) for step in steps]
    return with_thoughts([*calls, ("submit", {"answer": one.answer})])

  return EpisodeTask(
    id=one.id,
    key=one.id,
    domain="calculator",
    make=lambda: calculator.CalculatorEnvironment(one),
    solve=solve,
  )


def _actions(calls) -> list[Action]:
  return [
    Action(name=name, arguments=arguments, thought=thought)
    for name, arguments, thought in calls
  ]


def _repairs(config):
  def draw(generator):
    drawn = repairs.draw(config.size, config.largest, generator)
    return EpisodeTask(
      id=drawn.task.id,
      # The file says in words, as a program's question does, what to write.
      key=problem_lib.key_of("programs", drawn.content),
      domain="repairs",
      make=lambda: repair_environment.RepairEnvironment(drawn.task),
      solve=lambda: _actions(drawn.solution),
    )

  return draw


def _searches(config):
  def draw(generator):
    task = searches.draw(config.size, config.largest, generator)
    content = f"search {task.content}"
    return EpisodeTask(
      id=content,
      key=content,
      domain="searches",
      make=lambda: searches.SmallSearchEnvironment(task),
      solve=lambda: _actions(task.solution()),
    )

  return draw


def _lookups(config):
  names = config.domains or tuple(lookups.DOMAINS)

  def draw(generator):
    name = generator.choice(names)
    record = lookups.draw(name, generator, config.renamed)
    return _general_task(record, record["tasks"][0])

  return draw


def _general(config):
  path = pathlib.Path(config.path) / campaign.ENVIRONMENTS_FILE
  records = [
    record
    for record in campaign.read(path)
    if not config.domains or record["domain"] in config.domains
  ]
  if not records:
    raise ValueError(f"{path} has no environment of domains={config.domains}")

  def draw(generator):
    record = generator.choice(records)
    return _general_task(record, generator.choice(record["tasks"]))

  return draw


def _general_task(record, task) -> EpisodeTask:
  statement = hashlib.sha256(
    json.dumps([task["statement"], task["solution"]]).encode()
  ).hexdigest()
  return EpisodeTask(
    id=f"{record['fingerprint']}/{statement[:16]}",
    # Tasks of an environment share their data.
    key=record["fingerprint"],
    domain=record["domain"],
    make=functools.partial(general.GeneralEnvironment, record, task),
    solve=lambda: with_thoughts(solving.solution_calls(record, task)),
  )


_DRAW: dict[str, Callable[..., Callable[[random.Random], EpisodeTask]]] = {
  "calculator": _calculator,
  "lookups": _lookups,
  "general": _general,
  "repairs": _repairs,
  "searches": _searches,
}
