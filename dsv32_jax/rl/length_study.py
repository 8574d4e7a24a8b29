"""What a penalty on long answers costs and saves.

Paper section 3: reasoning is rewarded for its outcome less a length penalty,
and length is weighed against accuracy. A model learns from problems some of
which are solved step by step and some by the last step alone, so that it knows
both; from there GRPO goes on without the penalty, and with it.
"""

import dataclasses
import json
import os
from typing import Any

from dsv32_jax.agents import cold_start
from dsv32_jax.data import sources
from dsv32_jax.rl import loop
from dsv32_jax.rl import once
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import run_config
from dsv32_jax.rl import shown
from dsv32_jax.training import loop as training_loop
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run_folder

SOLVED_FILE = "solved.jsonl"
# Arm -> the reward of the config, which has the penalty.
ARMS = {
  "no penalty": lambda reward: dataclasses.replace(reward, length=None),
  "length penalty": lambda reward: reward,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthConfig:
  """A comparison; tokenizer and start of `rl` are its own to set.

  Attributes:
    rl: GRPO with the penalty.
    sft_optimizer: of the fine-tuning.
    solved: problems of each task that it learns from.
    direct_every: of one in so many the thinking holds the last step alone.
    steps: of the fine-tuning.
    sequence_length: tokens a row of it.
    batch_size: rows a step of it.
  """

  rl: run_config.RlConfig
  sft_optimizer: optimizer_lib.OptimizerConfig
  solved: int
  direct_every: int
  steps: int
  sequence_length: int
  batch_size: int

  def __post_init__(self):
    for name in ("direct_every", "solved", "steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    for name, is_wrong in {
      "evaluation": self.rl.evaluation is None,
      "reward.length": self.rl.reward.length is None,
      "reward.thinking": not self.rl.reward.thinking,
    }.items():
      if is_wrong:
        raise ValueError(f"rl.{name} must be set: it is what is compared")


def solved_rows(config: LengthConfig):
  """Yields the solved problems as rows of a source with a field `pieces`."""
  problems = shown.solved_problems(config.rl, config.solved)
  for number, problem in enumerate(problems):
    messages = problem.messages()
    if number % config.direct_every == 0:
      last = problem.reasoning.rpartition("\n")[2]
      messages[-1] = {**messages[-1], "reasoning_content": last}
    pieces = cold_start.pieces(messages, "thinking")
    yield {"pieces": json.dumps(pieces)}


def fine_tune(config: LengthConfig, workdir: str) -> dict[str, int]:
  """Makes the model that both arms start from, in `start/checkpoints`."""
  tokenizer = os.path.join(workdir, run_folder.TOKENIZER_FILE)
  policy_lib.make_tokenizer(config.rl).save(tokenizer)
  path = os.path.join(workdir, SOLVED_FILE)
  with open(path, "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in solved_rows(config))
  source = sources.SourceConfig(kind="jsonl", path=path, pieces_field="pieces")
  train = shown.sft_config(
    config, source, workdir, steps=config.steps, init_from=None
  )
  folder = os.path.join(workdir, "start")
  training_loop.train(train, folder, title="fine-tuning", root=workdir)
  return {"steps": config.steps}


def reinforce(config: LengthConfig, arm: str, workdir: str):
  """Runs GRPO with the reward of an arm.

  Returns:
    The held-out evaluations, each a dict with `version` (rollouts learned),
    `pass_at_1` and `answer_tokens`, and "seconds" of all rollouts.
  """
  folder = os.path.join(workdir, arm.replace(" ", "_"))
  rl = dataclasses.replace(
    config.rl,
    reward=ARMS[arm](config.rl.reward),
    init_from=os.path.join(workdir, "start", "checkpoints"),
    tokenizer=dataclasses.replace(
      config.rl.tokenizer, path=os.path.join(workdir, run_folder.TOKENIZER_FILE)
    ),
  )
  loop.train(rl, folder, title=arm, root=workdir)
  rows = metrics_lib.read_rows(os.path.join(folder, "metrics.jsonl"))
  times = metrics_lib.read_rows(os.path.join(folder, "timings.jsonl"))
  names = ("version", "pass_at_1", "answer_tokens")
  return {
    "held_out": [
      {name: row[name] for name in names}
      for row in rows
      if row["name"] == "held_out"
    ],
    "seconds": sum(row["seconds"] for row in times),
  }


def compare(config: LengthConfig, seed: int, workdir: str) -> dict[str, Any]:
  """Runs start and both arms with one seed, each once; what is done stays.

  Args:
    config: of the comparison.
    seed: added to the config's.
    workdir: folder of the comparison.

  Returns:
    By arm what `reinforce` gives.

  Raises:
    ValueError: if the folder holds another comparison.
    run.Stopped: after a SIGTERM, once the state is saved.
  """
  rl = dataclasses.replace(config.rl, seed=config.rl.seed + seed)
  config = dataclasses.replace(config, rl=rl)
  folder = os.path.join(workdir, f"seed_{seed}")
  os.makedirs(folder, exist_ok=True)
  run_folder.claim(config, folder, frozenset())

  def part(name, compute):
    path = os.path.join(folder, f"{name.replace(' ', '_')}.json")
    return once.once(path, compute)

  part("start", lambda: fine_tune(config, folder))
  return {
    arm: part(arm, lambda arm=arm: reinforce(config, arm, folder))
    for arm in ARMS
  }


def sweep(config: LengthConfig, seeds: int, workdir: str):
  """Yields (arm, result) of every run."""
  for seed in range(seeds):
    yield from compare(config, seed, workdir).items()
