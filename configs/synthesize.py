"""Synthesis of agentic tasks, offline and procedural.

python -m experiments.synthesize --config=configs/synthesize.py --workdir=DIR

The default is the paper's scale, 1,827 environments and 4,417 tasks. A few:
--config=configs/synthesize.py:small

Search tasks over Python's own documentation: :search, a few: :search_small

Code tasks out of the history of this repository, or another's: :code. With
--config.setup_url and --config.setup_model a model finds out how each tree is
built and tested, with judge_url and judge_model one judges the issues.

Questions that only code answers: :interpreter (the paper's 5,908), a few:
:interpreter_small

Written by a model behind an OpenAI-compatible server, such as
experiments.serve, and not by procedure: :authored (databases with tools and
tasks), :search_authored (questions; helpful prompts scored by the model) and
:interpreter_authored, with
--config.base_url=http://HOST:PORT/v1 --config.model=NAME
"""

from dsv32_jax.agents.synthesis.code import pipeline as code
from dsv32_jax.agents.synthesis.general import authored
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.interpreter import (
  authored as interpreter_authored,
)
from dsv32_jax.agents.synthesis.interpreter import pipeline as interpreter
from dsv32_jax.agents.synthesis.search import authored as search_authored
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
    "authored": authored.GeneralAuthoringConfig,
    "code": lambda: code.CodeSynthesisConfig(
      environment={"JAX_PLATFORMS": "cpu"}
    ),
    "interpreter": interpreter.InterpreterSynthesisConfig,
    "interpreter_small": lambda: interpreter.InterpreterSynthesisConfig(
      num_tasks=32, num_trajectories=4
    ),
    "interpreter_authored": interpreter_authored.InterpreterAuthoringConfig,
    "search": search.SearchSynthesisConfig,
    "search_authored": search_authored.SearchAuthoringConfig,
    "search_small": lambda: search.SearchSynthesisConfig(
      num_tasks=12,
      num_helpful=40,
      modules=("email", "http", "asyncio", "xml", "multiprocessing", "json"),
    ),
  }
  config = common.config_variant(variants, variant)
  # The family is in the name of a variant, where it is not "general".
  family = variant.removesuffix("_small")
  config.family = "general" if family in ("paper", "small") else family
  return config
