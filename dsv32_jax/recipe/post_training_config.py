"""What post-training consists of: domains, modes, stages and their sizes."""

import dataclasses
from typing import Literal

from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import run_config
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import stages
from dsv32_jax.verifiers import reward as reward_lib
from dsv32_jax.verifiers.tasks import mixture

Mode = Literal["thinking", "chat"]
Group = Literal["reasoning", "agent", "alignment"]
# In this order, where they are stages of their own.
GROUPS: tuple[Group, ...] = ("reasoning", "agent", "alignment")
# Names of parts that are no specialists.
_PARTS = ("start", "distillation", "distilled", "mixed", "sequential")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
  """A domain: what is asked or played, and how its specialists learn.

  Attributes:
    name: of the domain.
    group: which part of the mixture it is.
    task: what is asked, where an answer is a single one.
    environment: what is played; exactly one of the two. Their own name and
      thinking are not used.
    modes: a specialist for each (section 3: other models make the data with
      thinking and without).
    kl_weight: of its KL, in its specialists and in the mixed stage; None: that
      of rl.learner.grpo.
    solved: examples in the start's fine-tuning, in each mode; None: as many as
      PostTrainingConfig.solved.
    rollouts: of its specialists; None: as many as rl.rollouts. Likewise the
      fields below.
    optimizer: of its specialists.
    learner: of its specialists.
    reward: of its specialists; of an environment's the length alone, in the
      place of rl.episodes.length as well.
  """

  name: str
  group: Group
  task: mixture.TaskConfig | None = None
  environment: episode_config.EnvironmentConfig | None = None
  modes: tuple[Mode, ...] = ("thinking", "chat")
  kl_weight: float | None = None
  solved: int | None = None
  rollouts: int | None = None
  optimizer: optimizer_lib.OptimizerConfig | None = None
  learner: learner_config.LearnerConfig | None = None
  reward: reward_lib.RewardConfig | None = None

  def __post_init__(self):
    if not self.name or not self.name.replace("_", "").isalnum():
      raise ValueError(f"name={self.name!r} must be of letters, digits and _")
    if (self.task is None) == (self.environment is None):
      raise ValueError(
        f"domain {self.name}: exactly one of task and environment is to be"
        " given"
      )
    if not self.modes or len(set(self.modes)) < len(self.modes):
      raise ValueError(f"domain {self.name}: modes={self.modes} must differ")
    if (
      self.environment
      and self.reward
      and self.reward != _of_length(self.reward)
    ):
      raise ValueError(
        f"domain {self.name}: reward has fields for single answers: of"
        " episodes, reward.length alone counts besides the outcome"
      )
    for name in ("solved", "rollouts"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"domain {self.name}: {name}={value} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specialist:
  """A domain in one mode: what one specialist is for, and data of a mixture."""

  domain: DomainConfig
  mode: Mode

  @property
  def name(self) -> str:
    return f"{self.domain.name}_{self.mode}"

  @property
  def tasks(self) -> tuple[mixture.TaskConfig, ...]:
    """Its single answers, or ()."""
    return self._of(self.domain.task)

  @property
  def environments(self) -> tuple[episode_config.EnvironmentConfig, ...]:
    """Its episodes, or ()."""
    return self._of(self.domain.environment)

  @property
  def thinking(self) -> bool:
    return self.mode == "thinking"

  def _of(self, config):
    if config is None:
      return ()
    named = dataclasses.replace(
      config, name=self.name, thinking=self.mode == "thinking"
    )
    return (named,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostTrainingConfig:
  """The whole of it.

  Attributes:
    rl: what every GRPO stage shares; its tasks, environments, episode_prompts,
      tokenizer file and start are set by the stage.
    domains: of the specialists and of the mixture.
    rl_order: "mixed", one stage over all; "sequential", a stage for each group;
      "both", each from the distilled model.
    mixed_rollouts: of the mixed stage, or of the sequential ones together.
    sft_optimizer: of both fine-tunings.
    sft_stage: what trains in them.
    solved: examples of each domain and mode in the start's fine-tuning.
    start_steps: of it.
    distilled_steps: of the fine-tuning on specialists' answers.
    sequence_length: tokens a row of both.
    batch_size: rows a step of both.
    asked: problems that each specialist is asked.
    answers: to each.
    specialist_processes: of so many, each trains a specialist at a time, on a
      CPU; on an accelerator they train one after the other. Changes no number.
  """

  rl: run_config.RlConfig
  domains: tuple[DomainConfig, ...]
  rl_order: Literal["mixed", "sequential", "both"] = "mixed"
  mixed_rollouts: int
  sft_optimizer: optimizer_lib.OptimizerConfig
  sft_stage: stages.StageConfig = stages.SFT
  solved: int
  start_steps: int
  distilled_steps: int
  sequence_length: int
  batch_size: int
  asked: int
  answers: int
  specialist_processes: int = 1

  def __post_init__(self):
    if self.specialist_processes < 1:
      raise ValueError(
        f"specialist_processes={self.specialist_processes} must be positive"
      )
    if self.rl.evaluation is None:
      raise ValueError("rl.evaluation must be set: pass@1 is what is reported")
    names = [one.name for one in self.specialists]
    if not names or len(set(names)) < len(names):
      raise ValueError(f"domains={names} must be there, each name once")
    taken = [n for n in names if n.split("_")[0] in _PARTS]
    if taken:
      raise ValueError(f"domains: {taken[0]!r} is the name of another part")
    if self.rl.learner.domain_kl_weights:
      raise ValueError(
        f"rl.learner.domain_kl_weights={self.rl.learner.domain_kl_weights} must"
        " be (): a domain has its kl_weight"
      )
    if self.rl.episodes is None and any(d.environment for d in self.domains):
      raise ValueError("rl.episodes must be set: a domain has an environment")
    if self.mixed_rollouts < len(self.groups):
      raise ValueError(
        f"mixed_rollouts={self.mixed_rollouts} must be at least"
        f" {len(self.groups)}: as many as there are groups of domains"
      )
    # Raises where a stage cannot be.
    for one in self.specialists:
      self.specialist_rl(one)
    self.stage_rl(self.specialists, self.mixed_rollouts)

  @property
  def specialists(self) -> tuple[Specialist, ...]:
    """Every domain in every of its modes."""
    return tuple(
      Specialist(domain=domain, mode=mode)
      for domain in self.domains
      for mode in domain.modes
    )

  @property
  def groups(self) -> tuple[Group, ...]:
    """Groups that there is a domain of, in the order of sequential stages."""
    present = {domain.group for domain in self.domains}
    return tuple(group for group in GROUPS if group in present)

  def of_group(self, group: Group) -> tuple[Specialist, ...]:
    """Domains and modes of a group."""
    return tuple(x for x in self.specialists if x.domain.group == group)

  def specialist_rl(self, one: Specialist) -> run_config.RlConfig:
    """The run that makes a specialist."""
    own = {
      name: getattr(one.domain, name)
      for name in ("optimizer", "learner", "reward")
      if getattr(one.domain, name) is not None
    }
    rl = dataclasses.replace(self.rl, **own)
    if one.environments and one.domain.reward is not None:
      length = one.domain.reward.length
      episodes = dataclasses.replace(rl.episodes, length=length)
      rl = dataclasses.replace(rl, episodes=episodes)
    rollouts = one.domain.rollouts or self.rl.rollouts
    return self._stage(rl, (one,), rollouts)

  def stage_rl(self, parts, rollouts: int) -> run_config.RlConfig:
    """A run over some domains and modes at once.

    Args:
      parts: Specialists whose data it mixes, by their weights.
      rollouts: of the run.
    """
    return self._stage(self.rl, parts, rollouts)

  def _stage(self, rl, parts, rollouts) -> run_config.RlConfig:
    tasks = tuple(task for one in parts for task in one.tasks)
    played = tuple(x for one in parts for x in one.environments)
    episodes, share = None, None
    if played:
      episodes = dataclasses.replace(rl.episodes, environments=played)
    if tasks and played:
      weights = [sum(x.weight for x in some) for some in (tasks, played)]
      share = round(rl.prompts * weights[1] / sum(weights))
      share = min(max(share, 1), rl.prompts - 1)
    # All weights, not those of the parts alone: one program for all stages.
    weights = tuple(
      (one.name, one.domain.kl_weight)
      for one in self.specialists
      if one.domain.kl_weight is not None
    )
    return dataclasses.replace(
      rl,
      tasks=tasks,
      episodes=episodes,
      episode_prompts=share,
      rollouts=rollouts,
      # Without tasks, nothing but the length of an episode is rewarded.
      reward=rl.reward if tasks else _of_length(rl.reward),
      learner=dataclasses.replace(rl.learner, domain_kl_weights=weights),
    )


def _of_length(given: reward_lib.RewardConfig) -> reward_lib.RewardConfig:
  """What of a reward counts in episodes."""
  return reward_lib.RewardConfig(length=given.length)
