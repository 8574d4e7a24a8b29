"""GRPO on generated problems that a verifier checks.

python -m experiments.train_rl --config=configs/rl.py:tiny --workdir=DIR \
  --config.init_from=START/checkpoints \
  --config.tokenizer.path=START/tokenizer.json

Variants: tiny, tiny_async (sampling and learning side by side), small; episodes
of several turns in environments: calculator, calculator_async, lookups, repairs
(agentic coding in small), searches (agentic search in small); single answers
and episodes at once: mixed, mixed_async. Without init_from they start from
fresh weights, which solve nothing; for episodes, experiments.learned makes a
start. The stabilisers are switches:
--config.learner.grpo.unbiased_kl=False
--config.learner.grpo.off_policy_threshold=None
--config.learner.keep_routing=False
--config.learner.keep_sampling_mask=False
"""

import dataclasses

from dsv32_jax.agents import limits
from dsv32_jax.data import tokenizer
from dsv32_jax.generation import programs
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import presets
from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import run_config
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers.tasks import mixture
from experiments import common


def tiny_model() -> config_lib.ModelConfig:
  """Some 200,000 parameters: a second or two a rollout on two CPU cores."""
  return dataclasses.replace(
    presets.tiny(),
    vocab_size=384,
    width=64,
    # Layers of one kind: half the compilation.
    num_layers=2,
    num_dense_layers=0,
    expert_width=64,
    num_experts=8,
    query_latent_width=48,
    latent_width=32,
    nope_width=16,
    rope_width=16,
    value_width=16,
    index_heads=4,
    index_width=16,
    index_top_k=32,
    max_length=256,
    num_mtp_layers=0,
    initializer_scale=0.06,
  )


def rl_config(
  model: config_lib.ModelConfig,
  *,
  row_length: int,
  max_tokens: int,
  max_batch: int,
  **changes,
) -> run_config.RlConfig:
  """GRPO as we run it small: the paper publishes none of these numbers."""
  defaults = dict(
    tasks=(mixture.TaskConfig(kind="sorting", size=4, largest=20),),
    learner=learner_config.LearnerConfig(
      grpo=grpo.GrpoConfig(
        clip_low=0.2, clip_high=0.28, kl_weight=0.0, off_policy_threshold=0.1
      ),
      stage=learner_config.INDEXER_FROZEN,
      drop_equal_groups=True,
    ),
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=5e-4, warmup_steps=10),
      weight_decay=0.0,
    ),
    sampler=run_config.SamplerConfig(
      engine=programs.EngineConfig(
        max_batch=max_batch,
        page_size=16,
        num_pages=2 * max_batch * -(-(row_length + 1) // 16),
        # Of 32, 64 and 128 the quickest, tiny and lookups.
        prefill_chunk=64,
        max_length=row_length + 1,
      ),
      max_tokens=max_tokens,
    ),
    rollouts=200,
    prompts=16,
    group_size=8,
    row_lengths=(row_length,),
    evaluation=run_config.EvaluationConfig(every=20, problems=256),
    checkpoint=checkpoint.CheckpointConfig(every_steps=20),
  )
  return run_config.RlConfig(model=model, **(defaults | changes))


def tiny(**changes) -> run_config.RlConfig:
  """On two CPU cores."""
  return rl_config(
    tiny_model(), row_length=63, max_tokens=24, max_batch=16, **changes
  )


def shortened(config, *, rollouts=2, problems=4, group_size=2, **changes):
  """Of a run, so much that every part of it is reached."""
  return dataclasses.replace(
    config,
    rollouts=rollouts,
    prompts=2,
    group_size=group_size,
    evaluation=run_config.EvaluationConfig(every=2, problems=problems),
    **changes,
  )


# Families of environments that nothing is trained on.
UNSEEN = episode_config.LOOKUP_DOMAINS[-3:]
SEEN = episode_config.LOOKUP_DOMAINS[:-3]


def agent_model(vocab_size: int, window: int) -> config_lib.ModelConfig:
  """A tiny model for episodes, whose selection holds a whole one.

  Choosing keys would have to be learned as well, in minutes.
  """
  return dataclasses.replace(
    tiny_model(),
    vocab_size=vocab_size,
    index_top_k=window,
    max_length=window,
  )


def episodes(
  environment: episode_config.EnvironmentConfig,
  *,
  vocab_size: int,
  window: int,
  **changes,
) -> run_config.RlConfig:
  """Episodes of a few turns, without thinking, tools told by signatures."""
  defaults = dict(
    tasks=(),
    episodes=episode_config.EpisodesConfig(
      environments=(environment,),
      limits=limits.EpisodeLimits(turns=5, window=window, turn_tokens=96),
      thinking_mode="chat",
      tool_descriptions="signatures",
    ),
    tokenizer=tokenizer.TokenizerConfig(vocab_size=vocab_size),
    evaluation=run_config.EvaluationConfig(every=20, problems=128),
  )
  return rl_config(
    agent_model(vocab_size, window),
    row_length=window - 1,
    max_tokens=96,
    max_batch=16,
    **(defaults | changes),
  )


def calculator(**changes) -> run_config.RlConfig:
  """One step of arithmetic, by a tool."""
  one = episode_config.EnvironmentConfig(kind="calculator", size=2, largest=50)
  return episodes(one, vocab_size=384, window=176, **changes)


def mixed(**changes) -> run_config.RlConfig:
  """Single answers and episodes in one stage, half of the groups each."""
  return calculator(
    tasks=(
      mixture.TaskConfig(kind="sorting", size=3, largest=20, thinking=False),
    ),
    episode_prompts=8,
    row_lengths=(63, 175),
    **changes,
  )


def look_ups(
  *, renamed: bool = False, window: int = 304, **changes
) -> run_config.RlConfig:
  """Small general environments; three families of them are kept out.

  Args:
    renamed: whether as many more have words of their own, made up for each.
    window: tokens of an episode. Those of families trained on take up to 273,
      against 412 without whole texts of the format; of others up to 333.
    **changes: fields of the run.
  """
  one = episode_config.EnvironmentConfig(kind="lookups", domains=SEEN)
  others = dataclasses.replace(one, renamed=True, name="renamed")
  words = tokenizer.TokenizerConfig(vocab_size=768, whole_format=True)
  found = episodes(
    one, vocab_size=768, window=window, tokenizer=words, **changes
  )
  if not renamed:
    return found
  both = dataclasses.replace(found.episodes, environments=(one, others))
  return dataclasses.replace(found, episodes=both)


# Few constants in what is mended: a tiny model learns last to copy them.
_LARGEST = {"repairs": 3, "searches": 12}


def small_environment(kind: str, **changes) -> run_config.RlConfig:
  """Repairs or searches in the smallest size, with few tokens a call."""
  one = episode_config.EnvironmentConfig(
    kind=kind, size=1, largest=_LARGEST[kind]
  )
  words = tokenizer.TokenizerConfig(vocab_size=512, whole_format=True)
  return episodes(one, vocab_size=512, window=192, tokenizer=words, **changes)


def get_config(variant: str = "tiny"):
  def small():
    return rl_config(
      presets.small(),
      row_length=511,
      max_tokens=256,
      max_batch=128,
      tasks=tuple(
        mixture.TaskConfig(kind=kind, size=size)
        for kind, size in (
          ("arithmetic", 3),
          ("sorting", 5),
          ("brackets", 10),
          ("knights", 3),
        )
      ),
    )

  variants = {
    "tiny": tiny,
    "tiny_async": lambda: tiny(max_staleness=1),
    "small": small,
    "calculator": calculator,
    "calculator_async": lambda: calculator(max_staleness=1),
    "lookups": look_ups,
    "repairs": lambda: small_environment("repairs"),
    "searches": lambda: small_environment("searches"),
    "mixed": mixed,
    "mixed_async": lambda: mixed(max_staleness=1),
  }
  return common.config_variant(variants, variant)
