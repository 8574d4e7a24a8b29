"""GRPO with and without a length penalty: sorting, step by step or at once.

python -m experiments.rl_length --config=configs/rl_length.py --workdir=DIR \
  --seeds=3

Variants: full, smoke (a minute; shows that it runs and nothing else).
"""

import dataclasses

from configs import rl
from dsv32_jax.rl import length_study
from dsv32_jax.rl import run_config
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers.tasks import mixture
from experiments import common


def full() -> length_study.LengthConfig:
  return length_study.LengthConfig(
    rl=rl.rl_config(
      rl.tiny_model(),
      row_length=95,
      max_tokens=56,
      max_batch=16,
      tasks=(mixture.TaskConfig(kind="sorting", size=3, largest=20),),
      reward=reward.RewardConfig(
        thinking=True,
        # 25 tokens with one step in the thinking, 42 with three: 0.05 and 0.24.
        length=length.LengthPenalty(free_tokens=20, max_tokens=48, weight=0.3),
      ),
      optimizer=optimizer.OptimizerConfig(
        schedule=schedule.ScheduleConfig(peak=1e-3, warmup_steps=10),
        weight_decay=0.0,
      ),
      rollouts=40,
      prompts=16,
      evaluation=run_config.EvaluationConfig(every=20, problems=400),
      checkpoint=checkpoint.CheckpointConfig(every_steps=20, max_to_keep=1),
    ),
    sft_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(
        peak=3e-3, warmup_steps=20, hold_steps=380, decay_steps=400, final=3e-4
      )
    ),
    solved=2000,
    # With every other one GRPO drops the long form by itself.
    direct_every=8,
    steps=800,
    sequence_length=128,
    batch_size=16,
  )


def smoke() -> length_study.LengthConfig:
  config = full()
  return dataclasses.replace(
    config,
    rl=rl.shortened(config.rl),
    solved=20,
    steps=4,
  )


def get_config(variant: str = "full"):
  return common.config_variant({"full": full, "smoke": smoke}, variant)
