"""A whole synthesis of search tasks in one folder, continued if killed.

`corpus.sqlite` is the index, `candidates.jsonl` has a row a candidate, kept or
not, in order, and `helpful.jsonl` one a prompt of the second source. All else
is derived. What is there after an interruption is what is there without one,
the seconds apart.

`tasks.jsonl` and `tasks.parquet`, `rejections.jsonl`, `trajectories.jsonl` and
`trajectories.parquet`: see docs/agent_data.md.
"""

import asyncio
from collections.abc import Callable, Iterable
import functools
import pathlib
import random

from dsv32_jax.agents import results
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.general import campaign as folders
from dsv32_jax.agents.synthesis.search import constructing
from dsv32_jax.agents.synthesis.search import helpful
from dsv32_jax.agents.synthesis.search import pipeline
from dsv32_jax.agents.synthesis.search import python_docs

CANDIDATES_FILE = "candidates.jsonl"
HELPFUL_FILE = "helpful.jsonl"
CORPUS_FILE = "corpus.sqlite"
_FREE = ("workers", "num_tasks", "max_candidates", "num_helpful")
Progress = Callable[[Iterable[int]], Iterable[int]]


def run(
  config: pipeline.SearchSynthesisConfig,
  workdir: pathlib.Path,
  progress: Progress = iter,
) -> None:
  """Makes the candidates that the folder lacks, until enough are kept.

  Args:
    config: what to make.
    workdir: folder of this synthesis.
    progress: wraps the numbers of tasks that are still to be kept.

  Raises:
    ValueError: the folder holds another synthesis, one runs in it, or no
      class is of the long tail.
  """
  path = workdir / CANDIDATES_FILE
  with results.ResultsFile(path) as file:
    folders.check_config(config, workdir, _FREE, CORPUS_FILE)
    index = open_corpus(config, workdir)
    rng = random.Random(f"{config.seed}/tail")
    tail = constructing.long_tail(index, config.most_mentions, rng)
    index.close()
    if not tail:
      raise ValueError(
        f"config.most_mentions={config.most_mentions}: no class is mentioned"
        " by so few documents"
      )
    asked = {row["question"] for row in file.rows.values() if not row["reason"]}
    wanted = progress(range(len(asked), config.num_tasks))
    make = functools.partial(
      pipeline.synthesize, config, str(workdir / CORPUS_FILE), tail
    )
    _fill(file, config, make, asked, iter(wanted))


def _fill(file, config, make, asked, wanted):
  """Appends rows until there is nothing more wanted, or to be had."""
  if next(wanted, None) is None:
    return
  waiting = range(len(file.rows), config.max_candidates)
  clock_path = file.path.with_name(folders.SECONDS_FILE)
  folders.drop_partial_line(clock_path)
  with (
    clock_path.open("a", encoding="utf-8") as clock,
    folders.in_order(make, waiting, config.workers) as made,
  ):
    for row in made:
      seconds = row.pop("seconds")
      if not row["reason"] and row["question"] in asked:
        row["reason"] = "it equals another question"
      folders.write_line(clock, {"id": row["id"], "seconds": seconds})
      file.append(row)
      if not row["reason"]:
        asked.add(row["question"])
        if next(wanted, None) is None:
          return


def run_helpful(
  config: pipeline.SearchSynthesisConfig,
  workdir: pathlib.Path,
  progress: Progress = iter,
) -> None:
  """Judges the prompts of the second source that the folder lacks.

  Args:
    config: numbers; `run` has made the folder.
    workdir: folder of this synthesis.
    progress: wraps the indices that are still to be judged.

  Raises:
    ValueError: naming file and line, if a given prompt is none.
  """
  index = open_corpus(config, workdir)
  rng = random.Random(f"{config.seed}/helpful")
  # All of them are shuffled once, so that a larger number only adds.
  if config.prompts:
    prompts = helpful.read_prompts(pathlib.Path(config.prompts))
  else:
    prompts = helpful.prompts(index, rng)
  prompts = prompts[: config.num_helpful]
  with results.ResultsFile(workdir / HELPFUL_FILE) as file:
    for number in progress(range(len(file.rows), len(prompts))):
      prompt, rubric = prompts[number]
      found = asyncio.run(
        helpful.judge(prompt, rubric, index, config.least_gain)
      )
      row = {"id": f"helpful-{number:06d}", "question": prompt}
      file.append({**row, "rubric": helpful.dump(rubric), **found})
  index.close()


def open_corpus(
  config: pipeline.SearchSynthesisConfig, workdir: pathlib.Path
) -> search_index.LocalIndex:
  """Opens the folder's index, which is built if it is not there."""
  path = workdir / CORPUS_FILE
  if not path.exists():
    search_index.build(path, python_docs.documents(modules=config.modules))
  return search_index.LocalIndex(path)
