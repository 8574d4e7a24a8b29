"""Floating point operations that a model needs, counted by hand.

What the mathematics asks for and no more: a multiplication and an addition are
two operations. Compilers count a scanned layer once and kernels not at all, so
their count cannot stand in for this one.
"""

from typing import NamedTuple

from dsv32_jax.model import config as config_lib


class ForwardFlops(NamedTuple):
  """Operations of one forward of new tokens, by what they are spent on.

  Attributes:
    weights: products of activations with weights.
    attention: scores and sums over the selected latents.
    index_scores: of the indexer over all visible keys.
  """

  weights: float
  attention: float
  index_scores: float


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


def forward_flops(
  config: config_lib.ModelConfig, sequences: int, held: int, new: int
) -> ForwardFlops:
  """Counts a forward of new tokens behind what a cache holds.

  Each sequence takes its last token to the head.

  Args:
    config: shape of the model.
    sequences: of the batch.
    held: tokens of each in the cache.
    new: tokens of each to run.
  """
  counts = active_parameters(config)
  per_token = counts["attention"] + counts["indexer"] + counts["ffn"]
  per_layer = sequences * config.num_layers
  seen = visible_pairs(held + new) - visible_pairs(held)
  top_k = config.index_top_k
  chosen = selected_pairs(held + new, top_k) - selected_pairs(held, top_k)
  width = 2 * config.latent_width + config.rope_width
  return ForwardFlops(
    weights=2.0 * sequences * (per_token * new + counts["head"]),
    attention=2.0 * per_layer * chosen * config.num_heads * width,
    index_scores=float(per_layer * seen * index_pair_flops(config)),
  )


def visible_pairs(length: int) -> int:
  """Counts (query, key) pairs where each query sees the keys up to itself."""
  return length * (length + 1) // 2


def selected_pairs(length: int, top_k: int) -> int:
  """Counts (query, key) pairs where each query sees at most `top_k` keys."""
  full = min(length, top_k)
  return full * (full + 1) // 2 + (length - full) * full


def index_pair_flops(config) -> int:
  """Operations of one index score, all index heads."""
  return 2 * config.index_heads * config.index_width


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
