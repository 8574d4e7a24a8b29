"""Post-training of a tiny model over generated domains in both modes.

python -m experiments.post_train --config=configs/post_training.py --workdir=DIR

Variants: full, sequential (the last stage both mixed and one for each group of
domains), speciale, small (a domain of each group, both orders), smoke (a few
minutes; shows that it runs and nothing else).
"""

import dataclasses

from configs import rl
from dsv32_jax.agents import limits
from dsv32_jax.data import tokenizer
from dsv32_jax.recipe import post_training
from dsv32_jax.recipe import post_training_config
from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import run_config
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers.tasks import mixture
from experiments import common

# Words of several domains.
_VOCAB = 1024
# Tokens of the longest episode, tools and all, and of its longest reply.
_WINDOW = 224
_REPLY = 96
# Of the whole penalty on length, beside an outcome of 1.
_LENGTH_WEIGHT = 0.2
# Held-out problems of each domain in each mode.
_ASKED = 64


def _reasoning(name, task, **changes) -> post_training_config.DomainConfig:
  return post_training_config.DomainConfig(
    name=name, group="reasoning", task=task, **changes
  )


def _agent(name, environment, **changes) -> post_training_config.DomainConfig:
  return post_training_config.DomainConfig(
    name=name, group="agent", environment=environment, **changes
  )


def _domains() -> tuple[post_training_config.DomainConfig, ...]:
  """Each as small as it can be and still be one.

  Calculations are of 2 numbers in mathematics and of 3 elsewhere, or what is
  held out of one domain would be learned in another.
  """
  agents = (
    ("general_agent", "calculator", 3, 9),
    # Of constants up to 9 a start learns 6% in the time in which it learns 38%
    # of these: copying a number comes last.
    ("agentic_coding", "repairs", 1, 3),
    ("agentic_search", "searches", 1, 16),
  )
  return (
    *_reasoning_domains(),
    *(
      _agent(
        name,
        episode_config.EnvironmentConfig(kind=kind, size=size, largest=largest),
        # A rollout of episodes costs several of answers.
        rollouts=20,
      )
      for name, kind, size, largest in agents
    ),
    post_training_config.DomainConfig(
      name="instructions",
      group="alignment",
      task=mixture.TaskConfig(kind="instructions", size=3, largest=24),
      # No domain has so little in its rewards to keep it what it is.
      kl_weight=0.01,
    ),
  )


def _reasoning_domains() -> tuple[post_training_config.DomainConfig, ...]:
  task = mixture.TaskConfig
  return (
    _reasoning("mathematics", task(kind="arithmetic", size=2, largest=20)),
    _reasoning("programming", task(kind="programs", size=2, largest=9)),
    # Knights and knaves have few puzzles of 2 people, and long ones of 3.
    _reasoning("logic", task(kind="brackets", size=6)),
  )


def _reward(length_weight: float, reply: int = _REPLY) -> reward.RewardConfig:
  """Beside the outcome: the format of the mode, English, and brevity."""
  return reward.RewardConfig(
    format_weight=0.1,
    language="en",
    language_weight=0.05,
    length=length.LengthPenalty(
      free_tokens=reply // 2, max_tokens=reply, weight=length_weight
    ),
  )


def _base(domains, window=_WINDOW, **changes) -> run_config.RlConfig:
  """What all GRPO stages share."""
  # With a prompt it fits into the window.
  reply = min(_REPLY, window // 2)
  asked = tuple(d.task for d in domains if d.task is not None)
  played = tuple(d.environment for d in domains if d.environment is not None)
  episodes = played and episode_config.EpisodesConfig(
    environments=played,
    limits=limits.EpisodeLimits(turns=8, window=window, turn_tokens=reply),
    tool_descriptions="signatures",
    length=length.LengthPenalty(
      free_tokens=window // 2, max_tokens=window, weight=_LENGTH_WEIGHT
    ),
  )
  defaults = dict(
    tasks=asked,
    episodes=episodes or None,
    episode_prompts=1 if asked and played else None,
    reward=_reward(_LENGTH_WEIGHT, reply),
    tokenizer=tokenizer.TokenizerConfig(vocab_size=_VOCAB, whole_format=True),
    # Each stage starts its own, and these answers are soon scored.
    scoring_workers=1,
    # At 5e-4 with 8 prompts the mixed stage forgot within 20 rollouts how to
    # write a call: few groups of a domain are informative, and each moves all.
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=2e-4, warmup_steps=5),
      weight_decay=0.0,
    ),
    rollouts=48,
    prompts=16,
    group_size=8,
    # Answers are shorter than episodes; each length is compiled once.
    row_lengths=(window // 2 - 1, window - 1),
  )
  return rl.rl_config(
    rl.agent_model(_VOCAB, window),
    row_length=window - 1,
    max_tokens=reply,
    max_batch=32,
    **(defaults | changes),
  )


def full() -> post_training.PostTrainingConfig:
  domains = _domains()
  return post_training.PostTrainingConfig(
    rl=_base(
      domains,
      evaluation=run_config.EvaluationConfig(
        every=1, problems=_ASKED * sum(len(one.modes) for one in domains)
      ),
    ),
    domains=domains,
    mixed_rollouts=64,
    sft_optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=3e-3, warmup_steps=20)
    ),
    # Its selection holds a whole episode.
    sft_stage=learner_config.INDEXER_FROZEN,
    solved=400,
    start_steps=1000,
    distilled_steps=200,
    sequence_length=_WINDOW,
    batch_size=16,
    # Fewer accepted answers than this gives would be learned by heart.
    asked=160,
    answers=2,
    specialist_processes=2,
  )


def sequential() -> post_training.PostTrainingConfig:
  return dataclasses.replace(full(), rl_order="both")


def speciale() -> post_training.PostTrainingConfig:
  """As V3.2-Speciale: reasoning alone, hardly a penalty on length, proofs.

  Proofs and their self-evaluations are judged as in DeepSeekMath-V2, by a
  verifier and a meta-verifier that are scripts here. What is reported of them
  as pass@1 is the mean of that reward.
  """
  proofs = mixture.TaskConfig(kind="proofs", size=3, largest=9)
  domains = tuple(
    dataclasses.replace(one, modes=("thinking",))
    for one in (*_reasoning_domains(), _reasoning("proofs", proofs))
  )
  return dataclasses.replace(
    full(),
    rl=_base(
      domains,
      reward=_reward(_LENGTH_WEIGHT / 10),
      evaluation=run_config.EvaluationConfig(
        every=1, problems=_ASKED * len(domains)
      ),
    ),
    domains=domains,
  )


def small() -> post_training.PostTrainingConfig:
  """A domain of each group, whose answers and episodes are short; both orders.

  The sequential order against the mixed one, in some minutes.
  """
  window = 176
  domains = (
    _reasoning(
      "mathematics",
      mixture.TaskConfig(kind="arithmetic", size=2, largest=9),
      # All that there are to train on.
      solved=180,
    ),
    _agent(
      "general_agent",
      episode_config.EnvironmentConfig(kind="calculator", size=3, largest=9),
      modes=("chat",),
      rollouts=20,
    ),
    post_training_config.DomainConfig(
      name="instructions",
      group="alignment",
      task=mixture.TaskConfig(kind="instructions", size=2, largest=8),
      modes=("chat",),
    ),
  )
  parts = sum(len(one.modes) for one in domains)
  return dataclasses.replace(
    full(),
    rl=_base(
      domains,
      window=window,
      rollouts=40,
      evaluation=run_config.EvaluationConfig(every=1, problems=64 * parts),
    ),
    domains=domains,
    rl_order="both",
    mixed_rollouts=60,
    start_steps=400,
    distilled_steps=100,
    sequence_length=window,
    batch_size=8,
  )


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
      window=176,
      rollouts=2,
      prompts=4,
      group_size=2,
      evaluation=run_config.EvaluationConfig(every=1, problems=12),
    ),
    rl_order="both",
    mixed_rollouts=4,
    solved=12,
    start_steps=100,
    distilled_steps=4,
    sequence_length=176,
    batch_size=8,
    asked=6,
    answers=2,
  )


def get_config(variant: str = "full"):
  variants = {
    "full": full,
    "sequential": sequential,
    "speciale": speciale,
    "small": small,
    "smoke": smoke,
  }
  return common.config_variant(variants, variant)
