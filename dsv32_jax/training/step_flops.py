"""Floating point operations that a stage's step needs, counted by hand.

What the mathematics asks for and no more: a backward pass costs twice its
forward, a recomputed activation nothing. See `model.flops`.
"""

from typing import NamedTuple

from dsv32_jax.model import config as config_lib
from dsv32_jax.model import flops
from dsv32_jax.training import stages


class StepFlops(NamedTuple):
  """Operations of one optimiser step, by what they are spent on.

  Attributes:
    weights: products of activations with weights.
    attention: scores and sums of the main attention over the keys it sees.
    index_scores: scores of the indexer over all visible keys.
    indexer_kl: the target of the KL, and the gradient of the index scores.
  """

  weights: float
  attention: float
  index_scores: float
  indexer_kl: float

  @property
  def total(self) -> float:
    return sum(self)


def count(
  config: config_lib.ModelConfig,
  stage: stages.StageConfig,
  sequences: int,
  length: int,
) -> StepFlops:
  """Counts one optimiser step.

  Args:
    config: shape of the model.
    stage: what trains on which losses.
    sequences: of the global batch.
    length: tokens of a sequence, one document each.
  """
  tokens = sequences * length
  trains_model = stage.trains != "indexer"
  with_mtp = bool(
    config.num_mtp_layers and (stage.mtp_weight or stage.indexer_weight)
  )
  counts = flops.active_parameters(config)
  if not with_mtp:
    counts["mtp"] = 0
  uses_index = stage.select == "top_k" or stage.indexer_weight > 0
  weights = 0
  for part, count in counts.items():
    if part == "indexer":
      # Its inputs are detached: no gradient passes through to the model.
      passes = (3 if stage.indexer_weight else 1) if uses_index else 0
    elif part in ("head", "mtp") and not trains_model:
      # The warm-up needs hidden states, not tokens.
      passes = 1 if part == "mtp" else 0
    else:
      passes = 3 if trains_model else 1
    weights += 2 * passes * count * tokens
  layers = config.num_layers + (config.num_mtp_layers if with_mtp else 0)
  seen = flops.visible_pairs(length)
  chosen = seen
  if stage.select != "dense":
    chosen = flops.selected_pairs(length, stage.top_k or config.index_top_k)
  per_layer = sequences * layers
  return StepFlops(
    weights=float(weights),
    attention=float(
      per_layer * chosen * _pair_flops(config, stage, trains_model)
    ),
    index_scores=float(
      per_layer * seen * flops.index_pair_flops(config) if uses_index else 0
    ),
    indexer_kl=float(
      per_layer * chosen * _kl_pair_flops(config, stage)
      if stage.indexer_weight
      else 0
    ),
  )


def _pair_flops(config, stage, trains_model):
  """Attention operations for one key of one query, all heads."""
  forward_width = _score_width(config, stage) + _value_width(config, stage)
  # Backward: scores again, and the gradients of query, key, weight and value.
  backward_width = 3 * _score_width(config, stage) + 2 * _value_width(
    config, stage
  )
  width = forward_width + (backward_width if trains_model else 0)
  return 2 * config.num_heads * width


def _score_width(config, stage):
  if stage.select == "dense":
    return config.nope_width + config.rope_width
  return config.latent_width + config.rope_width


def _value_width(config, stage):
  return config.value_width if stage.select == "dense" else config.latent_width


def _kl_pair_flops(config, stage):
  """The target's scores once more, and the index scores' three products."""
  target = 2 * config.num_heads * _score_width(config, stage)
  return target + 3 * flops.index_pair_flops(config)
