"""How a policy learns from a rollout: every choice in one place."""

import dataclasses

from dsv32_jax.rl import grpo
from dsv32_jax.training import stages

# Ours, where the paper is silent: the indexer goes on learning the attention,
# biases and multi-token prediction rest.
JOINT = stages.SFT
# The indexer stays as it is, selection and all.
INDEXER_FROZEN = dataclasses.replace(
  stages.SFT, trains="model", indexer_weight=0.0
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig:
  """How a policy learns from a rollout.

  Attributes:
    grpo: the objective.
    stage: what trains; `lm_weight` weighs the policy's objective.
    temperature: of the sampler.
    keep_routing: replay the sampler's experts in the policy's forward.
    keep_sampling_mask: renormalise policy and reference over the kept sets.
    replay_selection: attend to the keys that the sampler attended to.
    reference_replays_routing: replay the sampler's experts in the reference's
      forward as well, which then is no longer the reference as such.
    domain_kl_weights: pairs of a domain and its KL weight; other domains have
      that of `grpo`.
    divide_by_std: advantages as in R1.
    drop_equal_groups: dynamic filtering: leave out groups without advantage.
    minibatches: optimiser steps a rollout is split into.
    reference_every: steps after which the policy becomes the reference (R1:
      400), or None for never.
  """

  grpo: grpo.GrpoConfig
  stage: stages.StageConfig = JOINT
  temperature: float = 1.0
  keep_routing: bool = True
  keep_sampling_mask: bool = True
  replay_selection: bool = False
  reference_replays_routing: bool = False
  domain_kl_weights: tuple[tuple[str, float], ...] = ()
  divide_by_std: bool = False
  drop_equal_groups: bool = False
  minibatches: int = 1
  reference_every: int | None = None

  def __post_init__(self):
    if not self.temperature > 0:
      raise ValueError(
        f"learner.temperature={self.temperature} must be positive: a greedy"
        " sampler has no distribution to learn"
      )
    if self.stage.trains == "indexer" or self.stage.lm_weight <= 0:
      raise ValueError(
        f"learner.stage.trains={self.stage.trains!r} with"
        f" lm_weight={self.stage.lm_weight} does not train the policy"
      )
    for name, value in self.domain_kl_weights:
      if not value >= 0:
        raise ValueError(f"learner.domain_kl_weights: {name}={value} is < 0")
    for name in ("minibatches", "reference_every"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"learner.{name}={value} must be positive")

  def kl_weight(self, domain: str) -> float:
    """The weight of a domain's KL."""
    return dict(self.domain_kl_weights).get(domain, self.grpo.kl_weight)

  @property
  def uses_reference(self) -> bool:
    """Whether any domain has a KL."""
    weights = [weight for _, weight in self.domain_kl_weights]
    return any(weight > 0 for weight in [self.grpo.kl_weight, *weights])

  @property
  def replays_routing(self) -> bool:
    """Whether the sampler has to record its routing."""
    return self.keep_routing or self.reference_replays_routing
