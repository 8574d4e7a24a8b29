"""Context management compared: score, steps and tokens (paper section 4.4).

Every strategy plays the same tasks with the same window. A step is a reply of
the model. Tokens read are those of every prompt, as if nothing of it were
cached; those of a summary are counted as well. Parallel sampling pays for all
of its trajectories.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from matplotlib import figure as figure_lib

from dsv32_jax.agents import context
from dsv32_jax.agents import loop
from dsv32_jax.agents import many
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.synthesis.search import pipeline

# None: the episode ends where the window does.
STRATEGIES: dict[str, loop.ContextManager | None] = {
  "none": None,
  "summary": context.Summary(max_tokens=2048),
  "discard_75": context.DISCARD_75,
  "discard_all": context.DISCARD_ALL,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
  """What is compared.

  Attributes:
    seed: of the attempts.
    num_tasks: of those given, from the first.
    window: tokens of prompt and reply.
    turns: replies of one trajectory at most.
    parallel: numbers of trajectories of parallel sampling.
    concurrency: tasks at a time.
  """

  seed: int = 0
  num_tasks: int = 40
  window: int = 12_288
  turns: int = 200
  parallel: tuple[int, ...] = (2, 4, 8)
  concurrency: int = 4

  def __post_init__(self):
    for name in ("num_tasks", "window", "turns", "concurrency"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if any(number < 2 for number in self.parallel):
      raise ValueError(f"parallel={self.parallel} must be numbers above 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramConfig:
  """A study with what it needs.

  Attributes:
    study: what is compared.
    tasks: what it is compared on.
    vocab_size: of the scripted policy's tokenizer, trained on the corpus.
    base_url, model: of an OpenAI-compatible endpoint; "" for the script.
  """

  study: StudyConfig
  tasks: pipeline.SearchSynthesisConfig
  vocab_size: int = 4096
  base_url: str = ""
  model: str = ""

  def __post_init__(self):
    if bool(self.base_url) != bool(self.model):
      raise ValueError(
        f"base_url={self.base_url!r} and model={self.model!r} go together"
      )
    if self.tasks.num_tasks < self.study.num_tasks:
      raise ValueError(
        f"tasks.num_tasks={self.tasks.num_tasks} is below"
        f" study.num_tasks={self.study.num_tasks}"
      )


@dataclasses.dataclass(kw_only=True)
class Trial:
  """What a strategy made of a task.

  Attributes:
    strategy: its name.
    task: its id.
    result: of the episode that counts.
    steps: replies of all its trajectories, summaries included.
    tokens_read: of all prompts.
    tokens_written: of all replies.
    longest_prompt: tokens.
  """

  strategy: str
  task: str
  result: loop.EpisodeResult
  steps: int
  tokens_read: int
  tokens_written: int
  longest_prompt: int

  def row(self) -> dict[str, Any]:
    """Returns the trial as JSON-able values, the episode's among them."""
    own = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != "result"
    }
    return {**self.result.row(), **own}


class _Meter:
  """A policy that counts what another one reads and writes."""

  def __init__(self, policy: policies.Policy):
    self.tokenizer = policy.tokenizer
    self._policy = policy
    self.steps = self.read = self.written = self.longest = 0

  async def complete(self, conversation, *, max_tokens):
    completion = await self._policy.complete(
      conversation, max_tokens=max_tokens
    )
    self.steps += 1
    self.read += completion.num_prompt_tokens
    self.written += completion.num_written_tokens
    self.longest = max(self.longest, completion.num_prompt_tokens)
    return completion


MakePolicy = Callable[[str], policies.Policy]
MakeEnvironment = Callable[[Mapping[str, Any]], Any]


def run(
  config: StudyConfig,
  tasks: Sequence[Mapping[str, Any]],
  make_policy: MakePolicy,
  make_environment: MakeEnvironment,
  path: pathlib.Path,
  on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
  """Plays every task with every strategy; a killed run goes on.

  Args:
    config: numbers.
    tasks: with an `id` each.
    make_policy: function of an attempt's name; equal names, equal policies.
    make_environment: function of a task.
    path: of the JSONL file of trials.
    on_row: told each new row.

  Returns:
    Rows as of `Trial.row`.

  Raises:
    ValueError: there are fewer tasks than are wanted.
  """
  if len(tasks) < config.num_tasks:
    raise ValueError(f"num_tasks={config.num_tasks}: only {len(tasks)} tasks")
  trials = {
    f"{strategy}/{task['id']}": (strategy, task)
    for task in tasks[: config.num_tasks]
    for strategy in names(config)
  }

  async def play(trial_id: str) -> Trial:
    strategy, task = trials[trial_id]
    return await _play(config, strategy, task, make_policy, make_environment)

  return asyncio.run(
    many.run_many(
      list(trials), play, path, concurrency=config.concurrency, on_row=on_row
    )
  )


def names(config: StudyConfig) -> list[str]:
  """Returns the names of all strategies."""
  return [*STRATEGIES, *(f"parallel_{count}" for count in config.parallel)]


async def _play(config, strategy, task, make_policy, make_environment) -> Trial:
  meters: list[_Meter] = []
  limits = loop.EpisodeLimits(turns=config.turns, window=config.window)

  def attempt(number: int) -> Awaitable[loop.Episode]:
    # The first attempt is the same under every strategy, until it differs.
    policy = _Meter(make_policy(f"{config.seed}/{task['id']}/{number}"))
    meters.append(policy)
    return loop.run_episode(
      policy,
      lambda: make_environment(task),
      episode_id=f"{strategy}/{task['id']}",
      limits=limits,
      manage_context=STRATEGIES.get(strategy),
    )

  if strategy in STRATEGIES:
    episode = await attempt(0)
  else:
    count = int(strategy.removeprefix("parallel_"))
    episode = await context.fewest_steps(attempt, count)
  return Trial(
    strategy=strategy,
    task=task["id"],
    result=episode.result,
    steps=sum(meter.steps for meter in meters),
    tokens_read=sum(meter.read for meter in meters),
    tokens_written=sum(meter.written for meter in meters),
    longest_prompt=max(meter.longest for meter in meters),
  )


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns a row a strategy: means over its tasks.

  `score` is the mean reward in percent; `overflowed` the share of tasks in
  which context management stepped in or the window ended the episode.
  """
  found: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    found.setdefault(row["strategy"], []).append(row)
  return [
    {
      "strategy": strategy,
      "tasks": len(trials),
      "score": round(100 * _mean(trials, "reward"), 1),
      "steps": round(_mean(trials, "steps"), 1),
      "tokens_read": round(_mean(trials, "tokens_read")),
      "tokens_written": round(_mean(trials, "tokens_written")),
      "longest_prompt": max(x["longest_prompt"] for x in trials),
      "context_changes": round(_mean(trials, "num_context_changes"), 2),
      "overflowed": round(
        sum(
          x["num_context_changes"] > 0 or x["finish"] == "max_tokens"
          for x in trials
        )
        / len(trials),
        3,
      ),
    }
    for strategy, trials in found.items()
  ]


def budget_curve(
  rows: Sequence[Mapping[str, Any]], budgets: Sequence[int]
) -> list[tuple[float, float]]:
  """What a strategy would have scored had it been stopped earlier.

  Args:
    rows: trials of one strategy of a single trajectory.
    budgets: steps at which an episode would have been stopped, unrewarded.

  Returns:
    Of each budget the mean steps taken and the score in percent.
  """
  curve = []
  for budget in budgets:
    steps = [min(row["steps"], budget) for row in rows]
    score = [row["reward"] * (row["steps"] <= budget) for row in rows]
    curve.append((sum(steps) / len(rows), 100 * sum(score) / len(rows)))
  return curve


def table(summary: Sequence[Mapping[str, Any]]) -> str:
  """Returns the summary as a Markdown table."""
  columns = list(summary[0])
  lines = [columns, ["---"] * len(columns)]
  lines += [[str(row[name]) for name in columns] for row in summary]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws score over mean steps, a line a strategy."""
  figure = figure_lib.Figure(figsize=(7.2, 4.6), layout="constrained")
  axes = figure.add_subplot()
  most = max(row["steps"] for row in rows)
  budgets = sorted({max(1, round(most ** (n / 24))) for n in range(25)})
  for strategy in STRATEGIES:
    trials = [row for row in rows if row["strategy"] == strategy]
    xs, ys = zip(*budget_curve(trials, budgets))
    axes.plot(xs, ys, marker=".", label=strategy)
  parallel = [
    row
    for row in summarize(rows)
    if row["strategy"] not in STRATEGIES or row["strategy"] == "none"
  ]
  axes.plot(
    [row["steps"] for row in parallel],
    [row["score"] for row in parallel],
    "k--s",
    label="parallel, fewest steps",
  )
  axes.set_xscale("log")
  axes.set_title("Context management: score against steps taken")
  axes.set_xlabel("mean steps a task (replies of the model)")
  axes.set_ylabel("tasks solved (percent)")
  axes.legend()
  figure.savefig(path, dpi=130)


def _mean(rows, name):
  return sum(row[name] for row in rows) / len(rows)
