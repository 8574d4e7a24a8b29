"""The kept mass equals a float64 computation from the model's weights."""

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax.evals import attention_mass
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from tests.support import models

TOP_K = 5


def numpy_attention(query_nope, query_rope, key_nope, key_rope, scale):
  """Head-averaged causal attention [B,T,S] in float64."""
  logits = np.einsum("bqhn,bshn->bhqs", query_nope, key_nope)
  logits = (logits + np.einsum("bqhr,bsr->bhqs", query_rope, key_rope)) * scale
  length = logits.shape[-1]
  logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)


def test_mean_attention_of_a_block():
  generator = np.random.default_rng(0)
  shapes = [(2, 9, 3, 4), (2, 9, 3, 2), (2, 9, 3, 4), (2, 9, 2)]
  arrays = [generator.standard_normal(shape) for shape in shapes]
  want = numpy_attention(*arrays, 0.5)
  arrays = [array.astype(np.float32) for array in arrays]
  got = attention_mass.mean_attention(
    arrays[0][:, 3:7], arrays[1][:, 3:7], *arrays[2:], np.arange(3, 7), 0.5
  )
  np.testing.assert_allclose(got, want[:, 3:7], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def measured():
  model = models.tiny_model(num_layers=2, num_mtp_layers=0)
  tokens = np.asarray(models.random_tokens((3, 32), seed=1))
  selectors = {
    "dsa": selection.TopK(TOP_K),
    "random": selection.Random(TOP_K),
    "window": selection.Window(TOP_K),
    "all": selection.TopK(32),
  }
  run = attention_mass.make_measure(nnx.split(model)[0], selectors, TOP_K)
  mass = attention_mass.measure(model, tokens, run, top_k=TOP_K, batch_size=2)
  per_token = jax.device_get(run(nnx.state(model), tokens[:2]))
  return model, tokens, mass, per_token


def test_shapes_and_order(measured):
  model, tokens, mass, per_token = measured
  for value in mass.values():
    assert value.shape == (model.config.num_layers, len(tokens))
  np.testing.assert_allclose(mass["all"], 1.0, rtol=1e-5)
  for name in ("dsa", "random", "window"):
    assert (per_token[name] <= per_token["best"] + 1e-6).all()
    # The first queries see no more keys than they may select.
    np.testing.assert_allclose(per_token[name][:, :, :TOP_K], 1.0, rtol=1e-5)
    np.testing.assert_allclose(
      mass[name][:, :2], per_token[name][:, :, TOP_K:].mean(-1), rtol=1e-6
    )


def test_window_and_best_equal_numpy(measured):
  model, tokens, _, per_token = measured
  output = model(
    tokens[:2],
    options=attention.AttentionOptions(select=selection.DENSE),
    trace=True,
  )
  trace = jax.tree.map(
    lambda x: np.asarray(x[0], np.float64),
    {
      key: output.dense.trace[key]
      for key in ("query_latent", "query_rope", "latent", "key_rope")
    },
  )
  module = model.dense_layers.attention
  nope = model.config.nope_width
  query_up = np.asarray(module.query_up[...][0], np.float64)[..., :nope]
  key_up = np.asarray(module.key_up[...][0], np.float64)
  weights = numpy_attention(
    np.einsum("btu,uhn->bthn", trace["query_latent"], query_up),
    trace["query_rope"],
    np.einsum("bsc,chn->bshn", trace["latent"], key_up),
    trace["key_rope"],
    model.config.softmax_scale,
  )
  best = np.sort(weights, axis=-1)[..., -TOP_K:].sum(axis=-1)
  np.testing.assert_allclose(per_token["best"][0], best, rtol=1e-4)
  band = np.tri(32, dtype=bool) & ~np.tri(32, k=-TOP_K, dtype=bool)
  window = (weights * band).sum(axis=-1)
  np.testing.assert_allclose(per_token["window"][0], window, rtol=1e-4)


def test_rows_too_short():
  model = models.tiny_model()
  with pytest.raises(ValueError, match="no position past top_k=8"):
    attention_mass.measure(
      model, np.zeros((1, 8), np.int32), None, top_k=8, batch_size=1
    )
