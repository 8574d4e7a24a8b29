"""What episodes teach a tiny model, on held-out tasks and unseen families.

python -m experiments.learned --config=configs/learned.py:lookups --workdir=DIR

Variants: lookups (small general environments, nine families seen and three
not), renamed (half of them in words made up for each), calculator (arithmetic
with a tool), repairs (a file to mend), searches (pages to search), smoke (shows
that it runs).
"""

import dataclasses

from configs import rl
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import learned
from dsv32_jax.rl import run_config
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from experiments import common


def _config(run: run_config.RlConfig, **changes) -> learned.LearnedConfig:
  defaults = dict(
    rl=run,
    held_out=400,
    solved=2000,
    sft_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=3e-3, warmup_steps=20)
    ),
    sequence_length=max(run.row_lengths),
    batch_size=16,
  )
  return learned.LearnedConfig(**(defaults | changes))


def calculator() -> learned.LearnedConfig:
  # From 4.7% solved (500 tasks, 250 steps) GRPO at 5e-4 with 8 groups a rollout
  # led nowhere in 24 rollouts: in most, hardly a group's rewards differed.
  gentle = optimizer.OptimizerConfig(
    schedule=schedule.ScheduleConfig(peak=2e-4, warmup_steps=10),
    weight_decay=0.0,
  )
  return _config(
    rl.calculator(rollouts=60, optimizer=gentle), held_out=256, sft_steps=600
  )


def look_ups(**changes) -> learned.LearnedConfig:
  unseen = episode_config.EnvironmentConfig(kind="lookups", domains=rl.UNSEEN)
  run = rl.look_ups(rollouts=120, prompts=8, **changes)
  return _config(run, unseen=(unseen,), sft_steps=2000)


def renamed() -> learned.LearnedConfig:
  """Names that cannot be learned by heart have to be read and copied."""
  config = look_ups(renamed=True, window=352)
  return dataclasses.replace(config, solved=6000)


def small_environment(kind: str) -> learned.LearnedConfig:
  run = rl.small_environment(kind, rollouts=40, prompts=8)
  return _config(run, held_out=200, sft_steps=400)


def smoke() -> learned.LearnedConfig:
  config = look_ups()
  return dataclasses.replace(
    config,
    rl=rl.shortened(config.rl, rollouts=1, problems=2),
    held_out=4,
    solved=20,
    sft_steps=2,
    batch_size=4,
  )


def get_config(variant: str = "lookups"):
  variants = {
    "lookups": look_ups,
    "renamed": renamed,
    "calculator": calculator,
    "repairs": lambda: small_environment("repairs"),
    "searches": lambda: small_environment("searches"),
    "smoke": smoke,
  }
  return common.config_variant(variants, variant)
