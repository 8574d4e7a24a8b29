"""GRPO against more supervised fine-tuning: sorting four numbers.

python -m experiments.rl_shown --config=configs/rl_shown.py --workdir=DIR

Variants: full, smoke (a minute; shows that it runs and nothing else), and
quickstart, from what `make quickstart` leaves:
--config.rl.init_from=runs/quickstart/sparse/checkpoints
--config.rl.tokenizer.path=runs/quickstart/tokenizer.json
"""

import dataclasses
from typing import Any

from configs import rl
from dsv32_jax.recipe import sizes
from dsv32_jax.rl import run_config
from dsv32_jax.rl import shown
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from experiments import common


def full() -> shown.ShownConfig:
  return _comparison(rl.tiny(prompts=32, **_run(rollouts=150, every=25)))


def quickstart() -> shown.ShownConfig:
  """A model that has read code, six times as large."""
  # With its tokenizer a problem has 68 tokens, an answer 20.
  run = rl.rl_config(
    sizes.full().model,
    row_length=95,
    max_tokens=24,
    max_batch=16,
    prompts=16,
    **_run(rollouts=80, every=20),
  )
  return _comparison(run)


def _run(*, rollouts: int, every: int) -> dict[str, Any]:
  """What else the runs share."""
  return dict(
    rollouts=rollouts,
    optimizer=optimizer.OptimizerConfig(
      # Two steps a rollout: the last are the smallest.
      schedule=schedule.ScheduleConfig(
        peak=1e-3, warmup_steps=10, decay_steps=2 * rollouts - 10, final=1e-4
      ),
      weight_decay=0.0,
    ),
    evaluation=run_config.EvaluationConfig(every=every, problems=400),
    checkpoint=checkpoint.CheckpointConfig(every_steps=50, max_to_keep=1),
  )


def _comparison(run: run_config.RlConfig) -> shown.ShownConfig:
  return shown.ShownConfig(
    rl=dataclasses.replace(
      run, learner=dataclasses.replace(run.learner, minibatches=2)
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
  return common.config_variant(
    {"full": full, "quickstart": quickstart, "smoke": smoke}, variant
  )
