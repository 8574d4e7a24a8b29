"""Post-training of a tiny model over three domains of generated problems.

python -m experiments.post_train --config=configs/post_training.py --workdir=DIR

Variants: full, smoke (a few minutes; shows that it runs and nothing else).
"""

import dataclasses

from configs import rl
from dsv32_jax.recipe import post_training
from dsv32_jax.rl import run_config
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers.tasks import mixture
from experiments import common


def _tiny(**changes) -> run_config.RlConfig:
  # Room for the words of several domains.
  model = dataclasses.replace(rl.tiny_model(), vocab_size=1024)
  return dataclasses.replace(rl.tiny(**changes), model=model)


def full() -> post_training.PostTrainingConfig:
  return post_training.PostTrainingConfig(
    rl=_tiny(
      tasks=(
        mixture.TaskConfig(kind="sorting", size=3, largest=20),
        mixture.TaskConfig(kind="arithmetic", size=2, largest=9),
        mixture.TaskConfig(kind="brackets", size=6),
      ),
      rollouts=80,
      prompts=32,
      evaluation=run_config.EvaluationConfig(every=80, problems=600),
    ),
    mixed_rollouts=80,
    sft_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=3e-3, warmup_steps=20)
    ),
    solved=100,
    start_steps=300,
    distilled_steps=300,
    sequence_length=128,
    batch_size=16,
    asked=150,
    answers=4,
  )


def smoke() -> post_training.PostTrainingConfig:
  config = full()
  return dataclasses.replace(
    config,
    rl=dataclasses.replace(
      config.rl,
      # Few problems, so that the start solves some of them.
      tasks=(
        mixture.TaskConfig(kind="sorting", size=2, largest=6),
        mixture.TaskConfig(kind="arithmetic", size=2, largest=2),
      ),
      rollouts=2,
      prompts=4,
      group_size=2,
      evaluation=run_config.EvaluationConfig(every=2, problems=8),
    ),
    mixed_rollouts=2,
    solved=12,
    start_steps=60,
    distilled_steps=4,
    asked=12,
    answers=4,
  )


def get_config(variant: str = "full"):
  return common.config_variant({"full": full, "smoke": smoke}, variant)
