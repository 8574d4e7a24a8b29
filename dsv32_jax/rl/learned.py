"""What episodes teach: fine-tuning on solved ones, then GRPO, each measured.

A fresh model learns from the solutions of a few tasks, called call by call;
from there GRPO goes on with new tasks of the same families. Before and after it
is asked held-out tasks of these families, and tasks of families that neither
has seen.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import os
import pathlib
from typing import Any

import jax

from dsv32_jax import sharding
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.rl import demonstrations
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import episodes
from dsv32_jax.rl import loop
from dsv32_jax.rl import once
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.rl import run_config
from dsv32_jax.rl import shown
from dsv32_jax.training import loop as training_loop
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run_folder

SOLVED_FILE = "solved.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedConfig:
  """An experiment; `rl.init_from` is its own to set.

  Attributes:
    rl: the GRPO run, whose environments the fine-tuning shares.
    unseen: environments that neither trains on; () for none.
    held_out: tasks that are asked, of the seen and of the unseen each.
    solved: tasks whose solutions the fine-tuning sees.
    sft_optimizer: of the fine-tuning.
    sft_steps: of the fine-tuning.
    sequence_length: tokens a row, several episodes in each.
    batch_size: rows a step.
  """

  rl: run_config.RlConfig
  unseen: tuple[episode_config.EnvironmentConfig, ...] = ()
  held_out: int
  solved: int
  sft_optimizer: optimizer_lib.OptimizerConfig
  sft_steps: int
  sequence_length: int
  batch_size: int

  def __post_init__(self):
    if self.rl.episodes is None or self.rl.evaluation is None:
      raise ValueError("rl.episodes and rl.evaluation must be set")
    for name in ("held_out", "solved", "sft_steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")


def run(config: LearnedConfig, workdir: str) -> dict[str, Any]:
  """Runs the parts, each once; what is done stays.

  Returns:
    By stage ("sft", "grpo") and group ("seen", "unseen") a list of
    rewards, 0 or 1, of the same tasks in the same order; and `domains` likewise
    by group.

  Raises:
    ValueError: if the folder holds another experiment.
    run.Stopped: after a SIGTERM, once the state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  run_folder.claim(config, workdir, frozenset())
  groups = _groups(config)
  tokenizer = os.path.join(workdir, run_folder.TOKENIZER_FILE)
  if not os.path.exists(tokenizer):
    policy_lib.make_tokenizer(config.rl).save(tokenizer)
  rl = dataclasses.replace(
    config.rl,
    tokenizer=tokenizer_lib.TokenizerConfig(path=tokenizer),
    init_from=os.path.join(workdir, "sft", "checkpoints"),
  )
  found: dict[str, Any] = {
    "domains": {
      name: [task.domain for task in tasks] for name, tasks in groups.items()
    }
  }

  def measured(stage, train):
    def compute():
      return _ask(rl, groups, train())

    path = os.path.join(workdir, f"{stage}.json")
    found[stage] = once.once(path, compute)

  measured("sft", lambda: fine_tune(config, workdir))
  measured(
    "grpo",
    lambda: loop.train(rl, os.path.join(workdir, "grpo"), root=workdir).model(),
  )
  return found


def fine_tune(config: LearnedConfig, workdir: str):
  """Fine-tunes a fresh model on solved episodes; returns it."""
  path = os.path.join(workdir, SOLVED_FILE)
  rl, folder = config.rl, os.path.join(workdir, "sft")
  if not os.path.exists(path):
    shown_tasks = itertools.islice(
      demonstrations.shown_tasks(rl.episodes.environments, rl.seed),
      config.solved,
    )
    demonstrations.write(rl.episodes, shown_tasks, pathlib.Path(path))
  source = sources.SourceConfig(kind="jsonl", path=path, pieces_field="pieces")
  train = shown.sft_config(
    config, source, workdir, steps=config.sft_steps, init_from=None
  )
  training_loop.train(train, folder, title="sft", root=workdir)
  return model_checkpoint.load_model(os.path.join(folder, "checkpoints"))


def curve(workdir: str) -> list[dict[str, float]]:
  """What GRPO's evaluations on the way found, by rollouts learned."""
  rows = metrics_lib.read_rows(os.path.join(workdir, "grpo", "metrics.jsonl"))
  return [row for row in rows if row["name"] == "held_out"]


def _groups(config) -> dict[str, Sequence[environments.EpisodeTask]]:
  given = {"seen": config.rl.episodes.environments, "unseen": config.unseen}
  found = {}
  for name, configs in given.items():
    if configs:
      tasks = environments.Tasks(
        configs, split="held_out", seed=config.rl.evaluation.seed
      )
      found[name] = tasks.different(-(-config.held_out // len(configs)))
  return found


def _ask(rl, groups, model) -> Mapping[str, list[float]]:
  """Asks a model each task once."""
  mesh = sharding.make_mesh(rl.mesh)
  tokenizer = tokenizer_lib.load(rl.tokenizer.path)
  with jax.set_mesh(mesh):
    sampler = episodes.Sampler(rl, model, tokenizer, mesh)
    sampler.load(model, 0)
    return {name: sampler.outcomes(tasks) for name, tasks in groups.items()}
