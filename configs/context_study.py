"""The study of context management on synthesised search tasks.

python -m experiments.context_study --config=configs/context_study.py \
  --workdir=DIR

A quick one: --config=configs/context_study.py:smoke
"""

from dsv32_jax.agents import context_study
from dsv32_jax.agents.synthesis.search import pipeline
from experiments import common


def get_config(variant: str = "study"):
  return common.config_variant(
    {
      "study": lambda: context_study.ProgramConfig(
        study=context_study.StudyConfig(),
        tasks=pipeline.SearchSynthesisConfig(num_tasks=40, num_helpful=0),
      ),
      "smoke": lambda: context_study.ProgramConfig(
        study=context_study.StudyConfig(
          num_tasks=4, window=6144, turns=60, parallel=(2,)
        ),
        tasks=pipeline.SearchSynthesisConfig(
          num_tasks=4, num_helpful=0, modules=("email", "http", "json", "xml")
        ),
      ),
    },
    variant,
  )
