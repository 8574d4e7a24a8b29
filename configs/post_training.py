"""Post-training of a tiny model over generated domains in both modes.

python -m experiments.post_train --config=configs/post_training.py --workdir=DIR

Variants: full, sequential (the last stage both mixed and one for each group of
domains), speciale, smoke (a few minutes; shows that it runs and nothing else).
"""

import dataclasses

from configs import rl
from dsv32_jax.agents import limits
from dsv32_jax.data import tokenizer
from dsv32_jax.recipe import post_training
from dsv32_jax.recipe import post_training_config
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import run_config
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers.tasks import mixture
from experiments import common

# Words of several domains.
_VOCAB = 1024
# Tokens of a whole episode, tools and all.
_WINDOW = 256


def _reasoning(name, task, **changes) -> post_training_config.DomainConfig:
  return post_training_config.DomainConfig(
    name=name, group="reasoning", task=task, **changes
  )


def _agent(name, environment, **changes) -> post_training_config.DomainConfig:
  return post_training_config.DomainConfig(
    name=name, group="agent", environment=environment, **changes
  )


def _domains() -> tuple[post_training_config.DomainConfig, ...]:
  """Each as small as it can be and still be one."""
  return (
    _reasoning(
      "mathematics", mixture.TaskConfig(kind="arithmetic", size=2, largest=9)
    ),
    _reasoning("logic", mixture.TaskConfig(kind="knights", size=2)),
    _agent(
      "general_agent",
      episode_config.EnvironmentConfig(kind="calculator", size=2, largest=50),
      modes=("chat",),
    ),
  )


def _base(domains, **changes) -> run_config.RlConfig:
  """What all GRPO stages share."""
  played = tuple(d.environment for d in domains if d.environment is not None)
  episodes = episode_config.EpisodesConfig(
    environments=played,
    limits=limits.EpisodeLimits(turns=6, window=_WINDOW, turn_tokens=96),
    tool_descriptions="signatures",
  )
  defaults = dict(
    tasks=tuple(d.task for d in domains if d.task is not None),
    episodes=episodes,
    episode_prompts=1,
    tokenizer=tokenizer.TokenizerConfig(vocab_size=_VOCAB),
    rollouts=20,
    prompts=16,
    group_size=8,
    # Answers are shorter than episodes; each length is compiled once.
    row_lengths=(_WINDOW // 2 - 1, _WINDOW - 1),
  )
  return rl.rl_config(
    rl.agent_model(_VOCAB, _WINDOW),
    row_length=_WINDOW - 1,
    max_tokens=96,
    max_batch=32,
    **(defaults | changes),
  )


def full() -> post_training.PostTrainingConfig:
  domains = _domains()
  return post_training.PostTrainingConfig(
    rl=_base(
      domains,
      evaluation=run_config.EvaluationConfig(
        every=1, problems=64 * sum(len(one.modes) for one in domains)
      ),
    ),
    domains=domains,
    mixed_rollouts=40,
    sft_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=3e-3, warmup_steps=20)
    ),
    solved=200,
    start_steps=600,
    distilled_steps=300,
    sequence_length=_WINDOW,
    batch_size=16,
    asked=64,
    answers=2,
  )


def sequential() -> post_training.PostTrainingConfig:
  return dataclasses.replace(full(), rl_order="both")


def smoke() -> post_training.PostTrainingConfig:
  sorting = mixture.TaskConfig(kind="sorting", size=2, largest=6)
  domains = (
    # Few problems, so that the start solves some of them.
    _reasoning("sorting", sorting),
    _agent(
      "calculator",
      episode_config.EnvironmentConfig(kind="calculator", size=2, largest=2),
      modes=("chat",),
    ),
  )
  return dataclasses.replace(
    full(),
    domains=domains,
    rl=_base(
      domains,
      rollouts=2,
      prompts=4,
      group_size=2,
      evaluation=run_config.EvaluationConfig(every=1, problems=12),
    ),
    rl_order="both",
    mixed_rollouts=4,
    solved=12,
    start_steps=60,
    distilled_steps=4,
    batch_size=4,
    asked=6,
    answers=2,
  )


def get_config(variant: str = "full"):
  variants = {"full": full, "sequential": sequential, "smoke": smoke}
  return common.config_variant(variants, variant)
