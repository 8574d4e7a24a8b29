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
import shutil
from typing import Any

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
  config: Any,
  workdir: pathlib.Path,
  progress: Progress = iter,
  *,
  plain: helpful.Answerer = helpful.without_search,
  searching: helpful.Answerer = helpful.with_search,
  scorer: helpful.Scorer = helpful.phrase_score,
) -> None:
  """Judges the prompts of the second source that the folder lacks.

  Args:
    config: pipeline.SearchSynthesisConfig or authored.SearchAuthoringConfig;
      `run` has made the folder.
    workdir: folder of this synthesis.
    progress: wraps the indices that are still to be judged.
    plain: answers without tools.
    searching: answers with them.
    scorer: of question, answer and rubric; called in a thread.

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

    async def judge_all():
      for number in progress(range(len(file.rows), len(prompts))):
        prompt, rubric = prompts[number]
        found = await helpful.judge(
          prompt,
          rubric,
          index,
          config.least_gain,
          scorer=scorer,
          plain=plain,
          searching=searching,
        )
        row = {"id": f"helpful-{number:06d}", "question": prompt}
        file.append({**row, "rubric": helpful.dump(rubric), **found})

    asyncio.run(judge_all())
  index.close()


def open_corpus(config: Any, workdir: pathlib.Path) -> search_index.LocalIndex:
  """Opens the folder's index, which is made if it is not there.

  Args:
    config: as of `run_helpful`; one with a `corpus` has a copy of that.
    workdir: folder of this synthesis.
  """
  path = workdir / CORPUS_FILE
  given = getattr(config, "corpus", "")
  if not path.exists() and given:
    search_index.LocalIndex(given).close()  # It is one.
    partial = path.with_suffix(".partial")
    shutil.copyfile(given, partial)
    partial.replace(path)
  if not path.exists():
    search_index.build(path, python_docs.documents(modules=config.modules))
  return search_index.LocalIndex(path)
