"""GRPO against more supervised fine-tuning: sorting four numbers.

python -m experiments.rl_shown --config=configs/rl_shown.py --workdir=DIR

Variants: full, smoke (a minute; shows that it runs and nothing else).
"""

import dataclasses

from configs import rl
from dsv32_jax.rl import run_config
from dsv32_jax.rl import shown
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from experiments import common


def full() -> shown.ShownConfig:
  config = rl.tiny(
    rollouts=150,
    prompts=32,
    optimizer=optimizer.OptimizerConfig(
      # Two steps a rollout: the last are the smallest.
      schedule=schedule.ScheduleConfig(
        peak=1e-3, warmup_steps=10, decay_steps=290, final=1e-4
      ),
      weight_decay=0.0,
    ),
    evaluation=run_config.EvaluationConfig(every=25, problems=400),
    checkpoint=checkpoint.CheckpointConfig(every_steps=50, max_to_keep=1),
  )
  return shown.ShownConfig(
    rl=dataclasses.replace(
      config, learner=dataclasses.replace(config.learner, minibatches=2)
    ),
    sft_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=3e-3, warmup_steps=20)
    ),
    # As GRPO's: a smaller step alone is worth some points to either.
    further_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(
        peak=1e-3, warmup_steps=20, decay_steps=2000, final=1e-4
      )
    ),
    # The more solved problems, the less is left to GRPO, which has fresh ones.
    solved=300,
    sequence_length=128,
    batch_size=16,
    evaluate_every=40,
    patience=4,
    max_steps=1200,
    further_evaluate_every=200,
  )


def smoke() -> shown.ShownConfig:
  config = full()
  return dataclasses.replace(
    config,
    rl=rl.shortened(config.rl),
    evaluate_every=2,
    further_evaluate_every=2,
    patience=1,
    max_steps=4,
  )


def get_config(variant: str = "full"):
  return common.config_variant({"full": full, "smoke": smoke}, variant)
