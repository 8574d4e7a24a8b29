"""The model on the TPU's kernels, interpreted, against the plain XLA path."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import attention
from dsv32_jax.model import cost_rule
from dsv32_jax.model import forms
from dsv32_jax.model import selection
from tests.support import models
from tests.support import stage_steps

SMALL = dict(num_layers=2, num_mtp_layers=0, num_heads=2)


def options(kernels, **changes):
  return attention.AttentionOptions(
    select=selection.TopK(6), kernels=kernels, **changes
  )


def test_forward_is_the_same():
  model = models.tiny_model(**SMALL)
  tokens_BT = models.random_tokens((2, 20))
  plain, kernels = (
    model(tokens_BT, options=options(name, form="expanded"), record=True)
    for name in ("xla", "tpu_interpret")
  )
  np.testing.assert_allclose(kernels.logits, plain.logits, rtol=1e-5, atol=2e-5)
  for want, got in zip(
    jax.tree.leaves(plain.moe.selection),
    jax.tree.leaves(kernels.moe.selection),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense_warmup", "sparse"])
def test_a_step_of_training_is_the_same(name):
  batch = stage_steps.packed_batch(rows=2, length=24)
  (want, wanted_state), (got, got_state) = (
    stage_steps.one_step(
      dataclasses.replace(
        stage_steps.STAGES[name], kernels=kernels, attention_form="expanded"
      ),
      batch,
      **SMALL,
    )
    for kernels in ("xla", "tpu_interpret")
  )
  for key in ("loss", "indexer_kl", "gradient_norm"):
    np.testing.assert_allclose(got[key], want[key], rtol=2e-5)
  # Adam's first step moves every weight by the rate: compare where it went.
  moved = stage_steps.flat(got_state)
  for path, value in stage_steps.flat(wanted_state).items():
    np.testing.assert_allclose(moved[path], value, atol=2e-4, err_msg=str(path))


def test_the_cost_rule_knows_lengths_and_platforms():
  top_k = attention.AttentionOptions(select=selection.TopK(256))
  on_tpu = dataclasses.replace(top_k, kernels="tpu")
  dense = attention.AttentionOptions(select=selection.DENSE)
  assert cost_rule.choose_form(top_k, 1, 4096) == "gathered"
  assert cost_rule.choose_form(dense, 1, 4096) == "absorbed"
  assert cost_rule.choose_form(dense, 4096, 4096) == "expanded"
  assert cost_rule.choose_form(top_k, 2048, 2048) == "expanded"
  assert cost_rule.choose_form(top_k, 4096, 4096) == "gathered"
  assert cost_rule.choose_form(on_tpu, 8192, 8192) == "expanded"
  assert cost_rule.choose_form(on_tpu, 16384, 16384) == "gathered"
  assert cost_rule.choose_kernels(top_k, 4096, jnp.bfloat16) == "xla"
  assert cost_rule.choose_kernels(on_tpu, 1, jnp.float32) == "tpu"
  assert cost_rule.choose_experts(top_k) == "xla"
  assert cost_rule.choose_experts(on_tpu) == "tpu"
  on_gpu = dataclasses.replace(top_k, kernels="gpu")
  assert cost_rule.choose_experts(on_gpu) == "ragged"


def test_a_tpu_gets_its_kernels_for_what_they_take(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  top_k = attention.AttentionOptions(select=selection.TopK(256))
  assert cost_rule.choose_kernels(top_k, 4096, jnp.bfloat16) == "tpu"
  # Gathered attention there takes bfloat16 alone, and one query fills no tile.
  assert cost_rule.choose_kernels(top_k, 4096, jnp.float32) == "xla"
  assert cost_rule.choose_kernels(top_k, 1, jnp.bfloat16) == "xla"
  assert cost_rule.choose_form(top_k, 8192, 8192) == "expanded"


@pytest.mark.parametrize("kernels", ["xla", "tpu", "tpu_interpret", "gpu"])
def test_gathered_kl_takes_the_kernels_asked_for(monkeypatch, kernels):
  asked = []

  def attend(query_BTHC, *_, implementation, **__):
    asked.append(implementation)
    return query_BTHC, query_BTHC[..., 0]

  def loss(*_, implementation, **__):
    asked.append(implementation)
    return jnp.zeros((1, 2))

  monkeypatch.setattr(forms.sparse_mla, "sparse_mla", attend)
  monkeypatch.setattr(forms.indexer_kl, "indexer_kl_gathered", loss)
  projected = types.SimpleNamespace(
    query_nope_BTHN=jnp.ones((1, 2, 3, 4)),
    query_rope_BTHR=jnp.ones((1, 2, 3, 2)),
    latent_BSC=jnp.ones((1, 2, 5)),
    key_rope_BSR=jnp.ones((1, 2, 2)),
    key_up_CHN=jnp.ones((5, 3, 4)),
    value_up_CHV=jnp.ones((5, 3, 4)),
  )
  index = types.SimpleNamespace(query_BTIK=None, weight_BTI=None)
  chosen = types.SimpleNamespace(indices_BTN=None)
  forms.gathered(
    *(projected, chosen, None, index, None), scale=1.0, kernels=kernels
  )
  assert asked == [kernels, kernels]


def test_unknown_kernels_are_named():
  with pytest.raises(ValueError, match="kernels='cuda'"):
    options("cuda")
