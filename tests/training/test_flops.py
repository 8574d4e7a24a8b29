"""Operations of a step against numbers worked out by hand."""

import dataclasses

import pytest

from dsv32_jax.model import flops
from dsv32_jax.model import presets
from dsv32_jax.training import stages
from dsv32_jax.training import step_flops

LENGTH = 131072


def test_active_parameters_of_the_671b_model():
  counts = flops.active_parameters(presets.deepseek_v32_671b())
  # V3 report: 37B active, the embedding's 0.9B not among what is multiplied.
  main = sum(counts.values()) - counts["mtp"]
  assert 36.5e9 < main < 37.8e9
  # Of an MLA layer, by hand: 187.1M with these ranks.
  assert counts["attention"] == 61 * 187105280


def test_selected_pairs_by_counting():
  for length, top_k in ((1, 4), (4, 4), (9, 4), (5, 1)):
    counted = sum(min(t + 1, top_k) for t in range(length))
    assert flops.selected_pairs(length, top_k) == counted


def test_sparse_step_is_430_gigaflop_a_token():
  # 225 weights, 123 attention, 65 index scores, 18 KL target, for 61 layers:
  # the arithmetic of one token at 128K.
  config = dataclasses.replace(presets.deepseek_v32_671b(), num_mtp_layers=0)
  found = step_flops.count(config, stages.SPARSE, 2, LENGTH)
  per_token = 2 * LENGTH
  assert found.attention / per_token == pytest.approx(123e9, rel=0.02)
  assert found.index_scores / per_token == pytest.approx(65.5e9, rel=0.02)
  kl = 61 * 2048 * (2 * 128 * 576 + 3 * 2 * 64 * 128)
  assert found.indexer_kl / per_token == pytest.approx(kl, rel=0.02)
  assert found.weights / per_token == pytest.approx(222e9, rel=0.03)


def test_warm_up_trains_the_indexer_alone():
  config = presets.deepseek_v32_671b()
  found = step_flops.count(config, stages.DENSE_WARMUP, 1, LENGTH)
  counts = flops.active_parameters(config)
  forward = counts["attention"] + counts["ffn"] + counts["mtp"]
  wanted = 2 * (forward + 3 * counts["indexer"]) * LENGTH
  assert found.weights == pytest.approx(wanted)
  pairs = 62 * LENGTH * (LENGTH + 1) / 2
  assert found.attention == pytest.approx(pairs * 2 * 128 * (192 + 128))


def test_more_tokens_cost_more():
  config = presets.tiny()
  one = step_flops.count(config, stages.PRETRAIN, 1, 64)
  two = step_flops.count(config, stages.PRETRAIN, 2, 64)
  assert two.total == pytest.approx(2 * one.total)
  assert one.index_scores == one.indexer_kl == 0


def test_a_forward_behind_a_cache_by_counting():
  config = dataclasses.replace(presets.tiny(), index_top_k=6)
  held, new, sequences = 5, 4, 3
  found = flops.forward_flops(config, sequences, held, new)
  layers = sequences * config.num_layers
  seen = [range(t + 1) for t in range(held, held + new)]
  index = 2 * config.index_heads * config.index_width
  assert found.index_scores == layers * index * sum(map(len, seen))
  latents = config.latent_width + config.rope_width + config.latent_width
  chosen = sum(len(keys[:6]) for keys in seen)
  assert found.attention == layers * chosen * 2 * config.num_heads * latents


def test_decoding_a_token_costs_37b_weights_once():
  config = presets.deepseek_v32_671b()
  found = flops.forward_flops(config, 1, LENGTH - 1, 1)
  assert found.weights == pytest.approx(2 * 37.1e9, rel=0.02)
  # The paper's point: the attention does not grow with what is held.
  half = flops.forward_flops(config, 1, LENGTH // 2, 1)
  assert found.attention == half.attention
  assert found.index_scores == pytest.approx(2 * half.index_scores, rel=1e-4)
