"""Solved problems of all domains and modes: what a start learns from."""

from collections.abc import Iterator
import dataclasses
import itertools
import json
import pathlib
import random

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import tables
from dsv32_jax.recipe import post_training_config as config_lib
from dsv32_jax.rl import demonstrations
from dsv32_jax.rl import environments
from dsv32_jax.rl import run_config
from dsv32_jax.verifiers import tasks


def write(config: config_lib.PostTrainingConfig, path: pathlib.Path) -> None:
  """Writes examples as data sources with pieces_field "pieces" read them.

  Every domain gives as many in each of its modes, of the training split and in
  the order of its problems' numbers; the file has them shuffled.
  """
  rows = []
  for one in config.specialists:
    rl = config.stage_rl((one,), 1)
    count = one.domain.solved or config.solved
    found = itertools.islice(conversations(rl, one), count)
    rows += [
      {
        "id": f"{one.name}-{number}",
        "pieces": json.dumps(cold_start.pieces(messages, one.mode)),
      }
      for number, messages in enumerate(found)
    ]
  random.Random(config.rl.seed).shuffle(rows)
  tables.write_jsonl(path, rows)


def conversations(
  rl: run_config.RlConfig, one: config_lib.Specialist
) -> Iterator[list[dict]]:
  """Yields solved problems of a domain in a mode, as chat messages.

  Args:
    rl: a run over that domain in that mode.
    one: domain and mode.
  """
  for task in one.tasks:
    for problem in tasks.generate(task.make(), split="train", seed=rl.seed):
      question, answer = problem.messages()
      if not one.thinking:
        answer = {k: x for k, x in answer.items() if k != "reasoning_content"}
      yield [question, answer]
  if one.environments:
    drawn = environments.Tasks(one.environments, split="train", seed=rl.seed)
    numbered = map(drawn.task, itertools.count())
    played = dataclasses.replace(rl.episodes, thinking_mode=one.mode)
    for result in demonstrations.solved(played, numbered):
      yield result.messages
