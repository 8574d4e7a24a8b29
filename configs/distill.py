"""Distillation of two small specialists in generated problems.

python -m experiments.distill --config=configs/distill.py --workdir=DIR \
  --config.tokenizer=START/tokenizer.json

The specialists are runs of experiments.train_rl in runs/rl/, each with the name
of its task. Variants: non_thinking, thinking.
"""

from dsv32_jax.distillation import config as config_lib
from dsv32_jax.generation import programs
from dsv32_jax.verifiers.tasks import mixture
from experiments import common

_TASKS = (
  mixture.TaskConfig(kind="sorting", size=4, largest=20),
  mixture.TaskConfig(kind="arithmetic", size=2, largest=9),
)


def _config(*, thinking: bool, max_tokens: int) -> config_lib.DistillConfig:
  length = 64 + max_tokens
  return config_lib.DistillConfig(
    specialists=tuple(
      config_lib.SpecialistConfig(
        name=task.kind,
        checkpoint=f"runs/rl/{task.kind}/checkpoints",
        tasks=(task,),
        problems=64,
        thinking=thinking,
      )
      for task in _TASKS
    ),
    tokenizer="runs/rl/tokenizer.json",
    engine=programs.EngineConfig(
      max_batch=16,
      page_size=16,
      num_pages=32 * -(-length // 16),
      prefill_chunk=32,
      max_length=length,
    ),
    max_tokens=max_tokens,
  )


def get_config(variant: str = "non_thinking"):
  variants = {
    "non_thinking": lambda: _config(thinking=False, max_tokens=32),
    "thinking": lambda: _config(thinking=True, max_tokens=160),
  }
  return common.config_variant(variants, variant)
