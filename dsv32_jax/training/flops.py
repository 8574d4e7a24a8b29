"""Floating point operations that a stage's step needs, counted by hand.

What the mathematics asks for and no more: a multiplication and an addition are
two operations, a backward pass costs twice its forward, a recomputed
activation nothing. Compilers count a scanned layer once and kernels not at
all, so their count cannot stand in for this one.
"""

from typing import NamedTuple

from dsv32_jax.model import config as config_lib
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


def active_parameters(config: config_lib.ModelConfig) -> dict[str, int]:
  """Counts the weights that one token is multiplied with.

  Returns:
    Counts by part: `attention`, `indexer`, `ffn`, `head` of the main model,
    and `mtp`, the multi-token prediction with its second use of the head. The
    embedding is looked up, not multiplied.
  """
  attention, indexer = _attention_layer(config), _indexer_layer(config)
  moe_layers = config.num_layers - config.num_dense_layers
  dense_ffn = 3 * config.width * config.ffn_width
  head = config.width * config.vocab_size
  mtp = 0
  if config.num_mtp_layers:
    joined = 2 * config.width * config.width
    mtp = joined + attention + indexer + _moe_layer(config) + head
  return {
    "attention": config.num_layers * attention,
    "indexer": config.num_layers * indexer,
    "ffn": config.num_dense_layers * dense_ffn
    + moe_layers * _moe_layer(config),
    "head": head,
    "mtp": mtp * config.num_mtp_layers,
  }


def step_flops(
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
  counts = active_parameters(config)
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
  seen = length * (length + 1) // 2
  chosen = seen
  if stage.select != "dense":
    chosen = selected_pairs(length, stage.top_k or config.index_top_k)
  per_layer = sequences * layers
  return StepFlops(
    weights=float(weights),
    attention=float(
      per_layer * chosen * _pair_flops(config, stage, trains_model)
    ),
    index_scores=float(
      per_layer * seen * _index_pair_flops(config) if uses_index else 0
    ),
    indexer_kl=float(
      per_layer * chosen * _kl_pair_flops(config, stage)
      if stage.indexer_weight
      else 0
    ),
  )


def selected_pairs(length: int, top_k: int) -> int:
  """Counts (query, key) pairs where each query sees at most `top_k` keys."""
  full = min(length, top_k)
  return full * (full + 1) // 2 + (length - full) * full


def _attention_layer(config):
  heads, width = config.num_heads, config.width
  query_width = config.nope_width + config.rope_width
  return (
    width * config.query_latent_width
    + config.query_latent_width * heads * query_width
    + width * (config.latent_width + config.rope_width)
    + config.latent_width * heads * (config.nope_width + config.value_width)
    + heads * config.value_width * width
  )


def _indexer_layer(config):
  return (
    config.query_latent_width * config.index_heads * config.index_width
    + config.width * config.index_width
    + config.width * config.index_heads
  )


def _moe_layer(config):
  expert = 3 * config.width * config.expert_width
  used = config.experts_per_token + config.num_shared_experts
  return used * expert + config.width * config.num_experts


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


def _index_pair_flops(config):
  return 2 * config.index_heads * config.index_width


def _kl_pair_flops(config, stage):
  """The target's scores once more, and the index scores' three products."""
  target = 2 * config.num_heads * _score_width(config, stage)
  return target + 3 * _index_pair_flops(config)
