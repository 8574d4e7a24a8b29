"""Solved problems of all domains and modes: what a start learns from."""

from collections.abc import Iterator
import itertools
import json
import pathlib
import random

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import tables
from dsv32_jax.recipe import post_training_config as config_lib
from dsv32_jax.rl import demonstrations
from dsv32_jax.verifiers import tasks


def write(config: config_lib.PostTrainingConfig, path: pathlib.Path) -> None:
  """Writes examples as data sources with pieces_field "pieces" read them.

  Every domain gives as many in each of its modes, of the training split and in
  the order of its problems' numbers; the file has them shuffled.

  Raises:
    ValueError: naming a domain that has not as many problems.
  """
  rows = []
  for one in config.specialists:
    count = one.domain.solved or config.solved
    drawn = _pieces(config.stage_rl((one,), 1), one)
    found = list(itertools.islice(drawn, count))
    if len(found) < count:
      raise ValueError(
        f"domain {one.domain.name}: solved={count}, but it has {len(found)}"
        " problems"
      )
    rows += [
      {"id": f"{one.name}-{number}", "pieces": json.dumps(pieces)}
      for number, pieces in enumerate(found)
    ]
  random.Random(config.rl.seed).shuffle(rows)
  tables.write_jsonl(path, rows)


def _pieces(rl, one) -> Iterator[list[dict]]:
  """Yields solved problems of a domain in a mode, as `data.pieces` has them."""
  for task in one.tasks:
    for problem in tasks.generate(task.make(), split="train", seed=rl.seed):
      yield demonstrations.problem_pieces(problem, thinking=one.thinking)
  if one.environments:
    shown = demonstrations.shown_tasks(one.environments, rl.seed)
    for result, mode in demonstrations.solved(rl.episodes, shown):
      yield cold_start.pieces(result.messages, mode)
