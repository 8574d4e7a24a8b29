"""Evaluation on the standard library's held-out files.

python -m experiments.evaluate --config=configs/evaluate.py \
  --checkpoint=DIR/checkpoints --workdir=DIR2

Rows of 512 tokens, a pass over all files. Other text:
--config.data.sources[0].kind=jsonl --config.data.sources[0].path='DIR/*.jsonl'
"""

from dsv32_jax.data import pipeline
from dsv32_jax.data import sources
from dsv32_jax.evals import evaluate
from experiments import common


def get_config(variant: str = "held_out"):
  return common.config_variant(
    {
      "held_out": lambda: evaluate.EvaluateConfig(
        data=pipeline.DataConfig(
          sources=(sources.SourceConfig(kind="stdlib_held_out"),),
          sequence_length=512,
          batch_size=8,
          seed=None,
          num_epochs=1,
        )
      )
    },
    variant,
  )
