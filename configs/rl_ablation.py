"""The four stabilisers on sorting, under staleness and a mismatched sampler.

python -m experiments.rl_ablation --config=configs/rl_ablation.py \
  --config.init_from=SHOWN/seed_0/start/checkpoints \
  --config.tokenizer.path=SHOWN/seed_0/tokenizer.json --workdir=DIR --seeds=3

The sampler's weights are rounded to 8 bits and it draws from a nucleus; it gets
the policy every other rollout, and each rollout is four steps. Variants: full,
smoke.
"""

import dataclasses

from configs import rl
from dsv32_jax.rl import run_config
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from experiments import common


def full() -> run_config.RlConfig:
  config = rl.tiny(
    rollouts=32,
    # At 1e-3, with the policy every fourth rollout, pass@1 falls from 52% to 2
    # with all four on.
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=5e-4, warmup_steps=10),
      weight_decay=0.0,
    ),
    weights_every=2,
    evaluation=run_config.EvaluationConfig(every=32, problems=400),
    checkpoint=checkpoint.CheckpointConfig(every_steps=16, max_to_keep=1),
  )
  learner = config.learner
  return dataclasses.replace(
    config,
    learner=dataclasses.replace(
      learner,
      grpo=dataclasses.replace(learner.grpo, kl_weight=0.02),
      minibatches=4,
    ),
    sampler=dataclasses.replace(
      config.sampler, top_p=0.9, weights="float8_e4m3fn"
    ),
  )


def smoke() -> run_config.RlConfig:
  return rl.shortened(full(), group_size=4)


def get_config(variant: str = "full"):
  return common.config_variant({"full": full, "smoke": smoke}, variant)
