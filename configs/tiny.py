"""The quickstart's model on the standard library's source text.

python -m experiments.train --config=configs/tiny.py:pretrain --workdir=DIR
python -m experiments.train --config=configs/tiny.py:dense_warmup \
  --config.init_from=DIR/checkpoints --workdir=DIR2

Variants: pretrain, dense_warmup, sparse, sft. A minute or a few each on two
CPU cores. --config.held_out.batches=8 --config.checkpoint.keep_best=1 measures
held-out text at each checkpoint and keeps the best one.
"""

import dataclasses

from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import presets
from dsv32_jax.training import checkpoint
from dsv32_jax.training import held_out
from dsv32_jax.training import optimizer
from dsv32_jax.training import run
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from experiments import common


def train_config(
  model: config_lib.ModelConfig,
  stage: stages.StageConfig,
  *,
  peak: float,
  steps: int,
  sequence_length: int,
  batch_size: int,
  **changes,
) -> run.TrainConfig:
  """A stage on the embedded text: short warm-up, then a cosine to a tenth."""
  warmup = max(1, steps // 20)
  return run.TrainConfig(
    model=model,
    stage=stage,
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(
        peak=peak,
        warmup_steps=warmup,
        decay_steps=steps - warmup,
        final=peak / 10,
      )
    ),
    data=pipeline.DataConfig(
      sources=(sources.SourceConfig(kind="stdlib_train"),),
      sequence_length=sequence_length,
      batch_size=batch_size,
      tokenizer=tokenizer.TokenizerConfig(vocab_size=model.vocab_size),
    ),
    steps=steps,
    checkpoint=checkpoint.CheckpointConfig(every_steps=max(1, steps // 4)),
    held_out=held_out.HeldOutConfig(
      sources=(sources.SourceConfig(kind="stdlib_held_out"),)
    ),
    **changes,
  )


def variants(model: config_lib.ModelConfig, *, steps: int, **size):
  """The four stages at a size; rates and lengths are ours."""
  sparse = dataclasses.replace(stages.SPARSE, router_bias_speed=1e-3)

  def stage(config, peak, steps):
    return lambda: train_config(model, config, peak=peak, steps=steps, **size)

  return {
    "pretrain": stage(stages.PRETRAIN, 3e-3, steps),
    "dense_warmup": stage(stages.DENSE_WARMUP, 3e-3, steps // 4),
    "sparse": stage(sparse, 1e-3, steps // 4),
    "sft": stage(stages.SFT, 3e-4, steps // 8),
  }


def get_config(variant: str = "pretrain"):
  return common.config_variant(
    variants(presets.tiny(), steps=400, sequence_length=512, batch_size=8),
    variant,
  )
