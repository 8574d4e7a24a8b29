"""Synthesis of agentic tasks, offline and procedural.

python -m experiments.synthesize --config=configs/synthesize.py --workdir=DIR

The default is the paper's scale, 1,827 environments and 4,417 tasks. A few:
--config=configs/synthesize.py:small

Search tasks over Python's own documentation: :search, a few: :search_small

Code tasks out of the history of this repository, or another's: :code
"""

from dsv32_jax.agents.synthesis.code import pipeline as code
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.search import pipeline as search
from experiments import common


def get_config(variant: str = "paper"):
  variants = {
    "paper": pipeline.SynthesisConfig,
    "small": lambda: pipeline.SynthesisConfig(
      num_environments=26, num_tasks=63, num_trajectories=10
    ),
  }
  variants |= {
    "code": lambda: code.CodeSynthesisConfig(
      environment={"JAX_PLATFORMS": "cpu"}
    ),
    "search": search.SearchSynthesisConfig,
    "search_small": lambda: search.SearchSynthesisConfig(
      num_tasks=12,
      num_helpful=40,
      modules=("email", "http", "asyncio", "xml", "multiprocessing", "json"),
    ),
  }
  # The family of a variant, where it is not "general".
  families = {"code": "code", "search": "search", "search_small": "search"}
  config = common.config_variant(variants, variant)
  config.family = families.get(variant, "general")
  return config
