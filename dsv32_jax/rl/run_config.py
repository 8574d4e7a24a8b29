"""A run of reinforcement learning, whole."""

import dataclasses
from typing import Literal

from dsv32_jax import sharding
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.generation import programs
from dsv32_jax.generation import requests
from dsv32_jax.model import config as model_config
from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import episode_config
from dsv32_jax.training import checkpoint as checkpoint_lib
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run as run_lib
from dsv32_jax.verifiers import reward as reward_lib
from dsv32_jax.verifiers.tasks import mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How answers are drawn; the temperature is the learner's.

  Attributes:
    engine: sizes of the generation engine.
    max_tokens: of an answer, or of each reply of an episode.
    top_p: as in requests.SamplingParameters.
    top_k: likewise.
    min_p: likewise.
    weights: what the sampler's weights are rounded to. Anything but "same" is
      a mismatch between sampler and learner, as of a low-precision server.
  """

  engine: programs.EngineConfig
  max_tokens: int
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0
  weights: Literal["same", "bfloat16", "float8_e4m3fn"] = "same"

  def parameters(
    self, *, temperature: float, seed: int
  ) -> requests.SamplingParameters:
    """Those of one answer."""
    return requests.SamplingParameters(
      max_tokens=self.max_tokens,
      temperature=temperature,
      top_p=self.top_p,
      top_k=self.top_k,
      min_p=self.min_p,
      seed=seed,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Held-out problems, answered once each at the learner's temperature.

  Attributes:
    every: rollouts between two evaluations.
    problems: different ones.
    seed: of problems and answers.
  """

  every: int
  problems: int
  seed: int = 0

  def __post_init__(self):
    for name in ("every", "problems"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"evaluation.{name}={getattr(self, name)} must be positive"
        )
    if self.seed < 0:
      raise ValueError(f"evaluation.seed={self.seed} is negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
  """One run of GRPO, whole.

  A rollout is `prompts` groups of `group_size` answers, drawn by one version
  of the policy; a version is what a rollout's optimiser steps make of it.

  Attributes:
    model: shape of the model; a checkpoint's own must agree with it.
    tasks: what is asked, where an answer is a single one.
    episodes: what is played, where it is an episode. A run may have both.
    episode_prompts: groups of a rollout that are of episodes, where it has
      both; the others are of single answers.
    reward: what is rewarded; of an episode, its outcome and length.
    learner: objective, replay, minibatches, reference.
    optimizer: AdamW and its schedule, over the optimiser's steps.
    sampler: how answers are drawn.
    rollouts: of the run.
    prompts: groups of a rollout.
    group_size: answers to a prompt (G).
    row_lengths: lengths that training rows may have, each compiled once; the
      largest holds prompt and answer.
    max_staleness: versions that the policy may be ahead of the one that drew
      what it learns from. 0: sampling and learning take turns; from 1 on they
      run side by side.
    weights_every: rollouts between two hand-overs of the policy to the
      sampler, where they take turns; beyond 1 rollouts are stale.
    scoring_workers: processes that score answers.
    scoring_seconds: an answer's score may take.
    evaluation: held-out pass@1 on the way, or None.
    tokenizer: of the policy; without a path, one trained on the tasks.
    init_from: folder of checkpoints whose model is the start, or None.
    mesh: devices along each axis.
    microbatches: pieces of a minibatch, one after the other.
    remat: what a layer keeps for its backward pass.
    parameter_dtype: storage of the weights.
    compute_dtype: activations and matmuls.
    seed: of prompts, draws, shuffles and fresh weights.
    checkpoint: when checkpoints are made, in rollouts, and which stay.
  """

  model: model_config.ModelConfig
  learner: learner_config.LearnerConfig
  optimizer: optimizer_lib.OptimizerConfig
  sampler: SamplerConfig
  rollouts: int
  prompts: int
  group_size: int
  row_lengths: tuple[int, ...]
  tasks: tuple[mixture.TaskConfig, ...] = ()
  episodes: episode_config.EpisodesConfig | None = None
  episode_prompts: int | None = None
  max_staleness: int = 0
  weights_every: int = 1
  scoring_workers: int = 2
  scoring_seconds: float = 10.0
  reward: reward_lib.RewardConfig = dataclasses.field(
    default_factory=reward_lib.RewardConfig
  )
  evaluation: EvaluationConfig | None = None
  tokenizer: tokenizer_lib.TokenizerConfig = dataclasses.field(
    default_factory=tokenizer_lib.TokenizerConfig
  )
  init_from: str | None = None
  mesh: sharding.MeshConfig = dataclasses.field(
    default_factory=lambda: sharding.MeshConfig(data=-1)
  )
  microbatches: int = 1
  remat: run_lib.Remat = "none"
  parameter_dtype: Literal["float32", "bfloat16"] = "float32"
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  seed: int = 0
  checkpoint: checkpoint_lib.CheckpointConfig = dataclasses.field(
    default_factory=lambda: checkpoint_lib.CheckpointConfig(every_steps=20)
  )

  def __post_init__(self):
    for name in ("rollouts", "prompts", "microbatches", "weights_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if self.group_size < 2:
      raise ValueError(
        f"group_size={self.group_size} must be at least 2: an answer's"
        " advantage is over the others of its group"
      )
    if self.max_staleness < 0:
      raise ValueError(f"max_staleness={self.max_staleness} is negative")
    if self.seed < 0:
      raise ValueError(f"seed={self.seed} is negative")
    if not self.row_lengths or min(self.row_lengths) < 1:
      raise ValueError(f"row_lengths={self.row_lengths} must be positive")
    if self.checkpoint.keep_best:
      raise ValueError(
        f"checkpoint.keep_best={self.checkpoint.keep_best} must be 0: no loss"
        " on held-out text is measured here"
      )
    self._check_shares()
    self._check_hand_over()
    self._check_sizes()
    if self.episodes is not None:
      self._check_episodes()

  def _check_shares(self):
    if not self.tasks and self.episodes is None:
      raise ValueError("tasks=() and episodes=None: one of them is to be given")
    share, both = self.episode_prompts, self.tasks and self.episodes
    if both and (share is None or not 0 < share < self.prompts):
      raise ValueError(
        f"episode_prompts={share} must be 1 to {self.prompts - 1} of"
        f" prompts={self.prompts}: the run has tasks and episodes"
      )
    if not both and share is not None:
      raise ValueError(
        f"episode_prompts={share} is for a run with tasks and episodes"
      )

  def _check_hand_over(self):
    if self.weights_every == 1:
      return
    if self.max_staleness:
      raise ValueError(
        f"weights_every={self.weights_every} goes with max_staleness=0: side"
        " by side, the sampler takes the newest policy"
      )
    for name, value in (
      ("rollouts", self.rollouts),
      ("checkpoint.every_steps", self.checkpoint.every_steps),
    ):
      if value % self.weights_every:
        raise ValueError(
          f"{name}={value} must be a multiple of"
          f" weights_every={self.weights_every}: a checkpoint holds no second"
          " policy"
        )

  def _check_sizes(self):
    if self.rows % self.microbatches:
      raise ValueError(
        f"microbatches={self.microbatches} does not divide the"
        f" {self.rows} rows of a minibatch"
      )
    longest = max(self.row_lengths)
    if longest > self.model.max_length:
      raise ValueError(
        f"row_lengths={self.row_lengths} exceed"
        f" model.max_length={self.model.max_length}"
      )
    # A row holds all tokens but the last, which nothing follows.
    if self.sampler.engine.max_length > longest + 1:
      raise ValueError(
        f"sampler.engine.max_length={self.sampler.engine.max_length} exceeds"
        f" the longest of row_lengths={self.row_lengths} by more than 1"
      )
    # Raises where a parameter is out of range.
    self.sampler.parameters(temperature=self.learner.temperature, seed=0)

  def _check_episodes(self):
    window, room = self.episodes.limits.window, self.sampler.engine.max_length
    if window > room:
      raise ValueError(
        f"episodes.limits.window={window} exceeds"
        f" sampler.engine.max_length={room}"
      )
    most, rows = self.episodes.most_parts, self.rows // self.microbatches
    if most > rows:
      raise ValueError(
        f"episodes.limits.context_changes="
        f"{self.episodes.limits.context_changes} with"
        f" when_full={self.episodes.when_full!r} may give {most} parts, more"
        f" than the {rows} rows of a microbatch"
      )
    alone = reward_lib.RewardConfig(length=self.reward.length)
    if not self.tasks and self.reward != alone:
      raise ValueError(
        "reward has fields for single answers: of episodes, reward.length alone"
        " counts besides the outcome"
      )

  @property
  def rows(self) -> int:
    """Rows of a minibatch; a rollout that was filtered leaves some empty."""
    return -(-self.prompts * self.group_size // self.learner.minibatches)

  @property
  def num_episode_groups(self) -> int:
    """Groups of a rollout that are of episodes."""
    if self.episodes is None:
      return 0
    return (
      self.prompts if self.episode_prompts is None else self.episode_prompts
    )

  @property
  def num_answer_groups(self) -> int:
    """Groups of a rollout that are of single answers."""
    return self.prompts - self.num_episode_groups

  @property
  def held_out_share(self) -> int:
    """Held-out problems of each task and of each environment."""
    kinds = len(self.tasks)
    if self.episodes is not None:
      kinds += len(self.episodes.environments)
    return -(-self.evaluation.problems // kinds)

  @property
  def asynchronous(self) -> bool:
    return self.max_staleness > 0
