"""From a seed to environments with their tasks, each independent of the rest.

An environment: draw a domain's variant, its rows and tools; propose tasks; keep
a task if a policy that sees neither solution nor verifier solves it within
`attempts` tries, stopping at its first success. What is not kept is recorded
with its reason.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import random
import time
from typing import Any

from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import read_only
from dsv32_jax.agents.synthesis.general import conditions
from dsv32_jax.agents.synthesis.general import database
from dsv32_jax.agents.synthesis.general import domains
from dsv32_jax.agents.synthesis.general import policies
from dsv32_jax.agents.synthesis.general import propose
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import toolset as toolset_lib

_TASK_TRIES = 20
_ENVIRONMENT_TRIES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
  """What to synthesise; the defaults are the paper's numbers.

  Attributes:
    seed: equal seeds give equal files.
    num_environments: databases with their tools.
    num_tasks: over all of them, as evenly as it goes.
    attempts: a task is kept if one of so many attempts solves it.
    filter: whose attempts, a name of policies.FILTERS.
    baseline_attempts: of each baseline on each kept task.
    num_trajectories: solutions written out call by call, of the first tasks.
    workers: processes; they do not change what is written.
  """

  seed: int = 0
  num_environments: int = 1827
  num_tasks: int = 4417
  attempts: int = 100
  filter: str = "searcher"
  baseline_attempts: int = 2
  num_trajectories: int = 200
  workers: int = 2

  def __post_init__(self):
    for name in ("num_environments", "attempts", "workers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    for name in ("baseline_attempts", "num_trajectories"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must not be negative")
    if self.filter not in policies.FILTERS:
      raise ValueError(
        f"filter={self.filter!r} is none of {', '.join(policies.FILTERS)}"
      )
    least, most = self.num_environments, 5 * self.num_environments
    if not least <= self.num_tasks <= most:
      raise ValueError(
        f"num_tasks={self.num_tasks} must be {least} to {most}, one to five"
        " for each environment"
      )

  def tasks_of(self, index: int) -> int:
    """How many tasks the environment of an index has."""
    return (index + 1) * self.num_tasks // self.num_environments - (
      index * self.num_tasks // self.num_environments
    )


@dataclasses.dataclass
class Timings:
  """Processor seconds spent on an environment."""

  synthesis: float = 0.0
  filter: float = 0.0
  baselines: float = 0.0


def synthesize(
  config: SynthesisConfig,
  index: int,
  policy: policies.Policy | None = None,
  known: frozenset[str] = frozenset(),
) -> tuple[dict[str, Any], Timings]:
  """Makes one environment.

  Args:
    config: seed and numbers.
    index: of the environment.
    policy: whose success keeps a task; None: config.filter.
    known: fingerprints of data that are taken.

  Returns:
    The environment's record, and where the time went. The record holds `id`,
    `domain`, `fingerprint` of the data, `pair` of schema and toolset, `rows`,
    `tools`, `tasks` and `rejections`.

  Raises:
    RuntimeError: if no try gives as many tasks as wanted.
  """
  timings, rejections = Timings(), []
  policy = policy or policies.FILTERS[config.filter]
  for number in range(_ENVIRONMENT_TRIES):
    rng = random.Random(f"{config.seed}/{index}/{number}")
    name = f"general-{index:05d}"

    def reject(kind, level, reason, name=name, number=number):
      rejections.append(
        {
          "environment": name,
          "try": number,
          "kind": kind,
          "level": level,
          "reason": reason,
        }
      )

    record = _try_environment(
      config, index, rng, policy, known, reject, timings
    )
    if record is not None:
      return {"id": name, **record, "rejections": rejections}, timings
  raise RuntimeError(
    f"environment {index} of seed {config.seed} gives too few tasks"
  )


def _try_environment(config, index, rng, policy, known, reject, timings):
  """Returns a record, or None with the reason told to `reject`."""
  begun = time.process_time()
  domain = domains.DOMAINS[index % len(domains.DOMAINS)]
  variant = database.draw_variant(domain, rng)
  rows = database.draw_rows(variant, rng)
  fingerprint = database.fingerprint(rows)
  if fingerprint in known:
    reject("environment", 0, "its data equal those of another")
    return None
  world = propose.World(
    data=conditions.Data(variant, rows),
    toolset=toolset_lib.draw(variant, rng),
    connection=read_only.connect(rows),
  )
  timings.synthesis += time.process_time() - begun
  kinds = rng.sample(propose.KINDS, len(propose.KINDS))
  if any(grid.name == "weather" for grid in variant.grids):
    kinds.insert(0, "trip")
  kept: list[dict[str, Any]] = []
  for number in range(_TASK_TRIES):
    if len(kept) == config.tasks_of(index):
      break
    kind = kinds[number % len(kinds)]
    task = _propose_kept(config, world, kind, rng, policy, reject, timings)
    if task is None:
      continue
    if any(task["statement"] == other["statement"] for other in kept):
      reject(kind, task["level"], "it equals another task")
      continue
    kept.append({"id": f"general-{index:05d}-{len(kept)}", **task})
  tools = [spec.dump() for spec in world.toolset.specs()]
  begun = time.process_time()
  for task in kept:
    task["baselines"] = _baselines(config, rows, tools, task)
  timings.baselines += time.process_time() - begun
  world.connection.close()
  if len(kept) < config.tasks_of(index):
    reject("environment", 0, f"only {len(kept)} tasks were kept")
    return None
  return {
    "domain": variant.name,
    "fingerprint": fingerprint,
    "pair": pair(rows, tools),
    "rows": rows,
    "tools": tools,
    "tasks": kept,
  }


def _propose_kept(config, world, kind, rng, policy, reject, timings):
  """Proposes a task and returns it if the policy can solve it."""
  begun = time.process_time()
  try:
    task = propose.propose(world, kind, rng, reject)
  except tasks.Rejection as rejection:
    reject(kind, 0, str(rejection))
    return None
  finally:
    timings.synthesis += time.process_time() - begun
  begun = time.process_time()
  seed = rng.random()
  used = solved_after(
    {
      "rows": world.data.rows,
      "tools": [spec.dump() for spec in world.toolset.specs()],
    },
    {"id": "proposed", **task},
    policy,
    config.attempts,
    seed,
  )
  timings.filter += time.process_time() - begun
  if used is None:
    reject(kind, task["level"], f"pass@{config.attempts} is zero")
    return None
  return task | {"attempts_until_solved": used}


def solved_after(
  record: Mapping[str, Any],
  task: Mapping[str, Any],
  policy: policies.Policy,
  attempts: int,
  seed: float,
) -> int | None:
  """Returns how many attempts the first success took, or None."""
  environment = general.GeneralEnvironment(record, task)
  try:
    for attempt in range(1, attempts + 1):
      rng = random.Random(f"{seed}/{attempt}")
      policy(environment.start(), environment.call, rng)
      if environment.reward() > 0:
        return attempt
    return None
  finally:
    environment.connection.close()


def pair(rows: database.Rows, tools: list[dict[str, Any]]) -> str:
  """Returns a digest of schema and toolset, without any data."""
  schema = {table: list(records[0]) for table, records in rows.items()}
  signatures = sorted(
    (tool["name"], json.dumps(tool["parameters"], sort_keys=True))
    for tool in tools
  )
  text = json.dumps([schema, signatures], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _baselines(config, rows, tools, task):
  """Returns how many attempts of each baseline solve a task."""
  environment = general.GeneralEnvironment({"rows": rows, "tools": tools}, task)
  solved = {}
  for name, policy in policies.BASELINES.items():
    rewards = []
    for attempt in range(config.baseline_attempts):
      rng = random.Random(f"{config.seed}/{task['id']}/{name}/{attempt}")
      policy(environment.start(), environment.call, rng)
      rewards.append(environment.reward())
    solved[name] = int(sum(rewards))
  environment.connection.close()
  return solved
