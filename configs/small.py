"""About 100M parameters on the standard library's source text.

python -m experiments.train --config=configs/small.py:pretrain --workdir=DIR

Variants: pretrain, dense_warmup, sparse, sft. For one accelerator; hours on a
CPU.
"""

from configs import tiny
from dsv32_jax.model import presets
from experiments import common


def get_config(variant: str = "pretrain"):
  return common.config_variant(
    tiny.variants(
      presets.small(), steps=4000, sequence_length=4096, batch_size=8
    ),
    variant,
  )
