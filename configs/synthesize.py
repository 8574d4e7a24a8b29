"""Synthesis of general agentic tasks, offline and procedural.

python -m experiments.synthesize --config=configs/synthesize.py --workdir=DIR

The default is the paper's scale, 1,827 environments and 4,417 tasks. A few:
--config=configs/synthesize.py:small
"""

from dsv32_jax.agents.synthesis.general import pipeline
from experiments import common


def get_config(variant: str = "paper"):
  return common.config_variant(
    {
      "paper": pipeline.SynthesisConfig,
      "small": lambda: pipeline.SynthesisConfig(
        num_environments=26, num_tasks=63, num_trajectories=10
      ),
    },
    variant,
  )
