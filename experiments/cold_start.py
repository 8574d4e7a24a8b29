"""Samples trajectories under the cold start's prompts and keeps what is right.

python -m experiments.synthesize --config=configs/synthesize.py:search_small \
  --workdir=TASKS
python -m experiments.cold_start --config=configs/cold_start.py \
  --config.search_tasks=TASKS --workdir=DIR

Problems of `verifiers.tasks` are reasoned about without tools; search tasks are
answered with tools, with and without thinking. Who answers are scripts that err
at times, or with --config.base_url and --config.model a model behind an
OpenAI-compatible endpoint (such as experiments.serve). DIR then has every
trajectory in episodes.jsonl, and sft.jsonl with rejections.jsonl; a killed run
goes on. docs/agent_data.md says what is in them and how to train on it.
"""

import asyncio
import collections
import itertools
import pathlib
import random
import sys

from absl import flags
import openai
import tqdm

from dsv32_jax import config_files
from dsv32_jax.agents import cold_start
from dsv32_jax.agents import endpoint
from dsv32_jax.agents import loop
from dsv32_jax.agents import many
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import reader
from dsv32_jax.verifiers import tasks as problem_tasks
from experiments import common

common.define_common_flags()
_PROBLEMS = (
  problem_tasks.Arithmetic(),
  problem_tasks.Brackets(),
  problem_tasks.Knights(),
  problem_tasks.Sorting(),
)
_LIMITS = search.SearchLimits(page_chars=16_000)
_ERRS = 0.3  # of the attempts of the script that reasons


def main(argv):
  del argv
  config = config_files.build(cold_start.ColdStartConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  sampler = Sampler(config)
  ids = [
    f"{mode}/{task}/{attempt}"
    for mode in config.modes
    for task in sampler.tasks(mode)
    for attempt in range(config.attempts)
  ]
  with tqdm.tqdm(total=len(ids), disable=not sys.stderr.isatty()) as bar:
    rows = asyncio.run(
      many.run_many(
        ids,
        sampler.run,
        workdir / "episodes.jsonl",
        concurrency=config.concurrency,
        on_row=lambda row: bar.update(),
      )
    )
  kept, left_out = cold_start.sft_rows(
    rows,
    least_reward=config.least_reward,
    most_of_a_task=config.most_of_a_task,
  )
  cold_start.write(workdir, kept, left_out)
  for mode in config.modes:
    number = sum(row["mode"] == mode for row in kept)
    sampled = sum(row["mode"] == mode for row in rows)
    print(f"{mode}: {number} examples of {sampled} trajectories")
  for reason, number in collections.Counter(
    row["reason"] for row in left_out
  ).most_common():
    print(f"left out: {number} {reason}")
  print(workdir / "sft.jsonl")


class Sampler:
  """Tasks by mode, and a function that plays one."""

  def __init__(self, config: cold_start.ColdStartConfig):
    self._config = config
    streams = (
      problem_tasks.generate(task, split="train", seed=config.seed)
      for task in _PROBLEMS
    )
    problems = itertools.chain.from_iterable(zip(*streams))
    self._problems = dict(
      enumerate(itertools.islice(problems, config.num_tasks))
    )
    self._search, self._index = {}, None
    if config.search_tasks:
      folder = pathlib.Path(config.search_tasks)
      rows = (
        row
        for row in tables.read_jsonl(folder / "tasks.jsonl")
        if row["kind"] == "question"
      )
      rows = itertools.islice(rows, config.num_tasks)
      self._search = {row["id"]: row for row in rows}
      self._index = search_index.LocalIndex(folder / campaign.CORPUS_FILE)
    self._client = None
    if config.base_url:
      self._client = openai.AsyncOpenAI(base_url=config.base_url)

  def tasks(self, mode: str) -> list[str]:
    """Returns the names of a mode's tasks."""
    if cold_start.MODES[mode].tools:
      return list(self._search)
    return [str(number) for number in self._problems]

  async def run(self, episode_id: str) -> cold_start.Trajectory:
    """Samples one trajectory."""
    mode_name, task, _ = episode_id.split("/")
    mode = cold_start.MODES[mode_name]
    rng = random.Random(f"{self._config.seed}/{episode_id}")
    if mode.tools:
      row = self._search[task]
      result = await cold_start.sample_with_tools(
        self._policy(self._reader(mode, rng)),
        mode,
        lambda: search.SearchEnvironment(self._index, row, limits=_LIMITS),
        episode_id=episode_id,
        limits=loop.EpisodeLimits(turns=mode.max_calls + 1),
      )
    else:
      problem = self._problems[int(task)]
      result = await cold_start.sample_reasoning(
        self._policy(lambda messages: _solve(problem, rng)),
        problem.question,
        lambda text: problem.score(text).value,
        episode_id=episode_id,
      )
    return cold_start.Trajectory(mode=mode_name, task=task, result=result)

  def _policy(self, script: policies.Script) -> policies.Policy:
    if self._client is not None:
      return endpoint.EndpointPolicy(self._client, self._config.model)
    return policies.ScriptedPolicy(script)

  def _reader(self, mode, rng) -> policies.Script:
    script = reader.script(rng)
    if mode.thinking_mode == "thinking":
      return script
    return lambda messages: {**script(messages), "reasoning_content": ""}


def _solve(problem, rng):
  """A right solution, or one whose answer is another's."""
  reply = problem.messages()[1]
  if rng.random() < _ERRS:
    reply = {**reply, "content": "\\boxed{0}"}
  return reply


if __name__ == "__main__":
  common.run(main)
