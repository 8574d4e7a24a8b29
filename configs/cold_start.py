"""The cold start: trajectories for supervised fine-tuning.

python -m experiments.cold_start --config=configs/cold_start.py \
  --config.search_tasks=TASKS --workdir=DIR

TASKS is a workdir of experiments.synthesize with a search variant. Reasoning
alone, which needs none: --config=configs/cold_start.py:reasoning
"""

from dsv32_jax.agents import cold_start
from experiments import common


def get_config(variant: str = "all"):
  return common.config_variant(
    {
      # The folder is given by a flag, so the check is the program's.
      "all": lambda: cold_start.ColdStartConfig(search_tasks="TASKS"),
      "reasoning": lambda: cold_start.ColdStartConfig(modes=("reasoning",)),
    },
    variant,
  )
