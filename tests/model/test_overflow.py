"""Values far beyond the range of 8 bits, and infinities, in the indexer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import attention
from dsv32_jax.model import selection
from tests.support import models

# A power of two, with which nothing rounds otherwise: 448 * 2**40 is far beyond
# the largest 8-bit number.
FAR = 2.0**40


def indexers(model):
  return [
    layers.attention.indexer
    for layers in (model.dense_layers, model.moe_layers)
  ]


@jax.jit
def forward(model, tokens):
  options = attention.AttentionOptions(
    select=selection.TopK(6), index_quantized=True
  )
  output = model(tokens, options=options)
  parts = (output.dense, output.moe)
  return output.logits, [jnp.any(part.invalid_BT) for part in parts]


@pytest.mark.parametrize("where", ["query", "key"])
def test_large_index_values_select_the_same_keys(where):
  """Scores scaled by a power of two keep their order, bit for bit."""
  tokens = models.random_tokens((2, 37))
  want, _ = forward(models.tiny_model(), tokens)
  scaled = models.tiny_model()
  for indexer in indexers(scaled):
    if where == "query":
      indexer.query[...] = indexer.query[...] * FAR
    else:
      indexer.key_norm.scale[...] = indexer.key_norm.scale[...] * FAR
      indexer.key_norm.bias[...] = indexer.key_norm.bias[...] * FAR
  got, invalid = forward(scaled, tokens)
  assert np.isfinite(got).all() and not any(invalid)
  np.testing.assert_array_equal(got, want)


def test_an_infinite_index_value_is_reported():
  model = models.tiny_model()
  for indexer in indexers(model):
    indexer.query[...] = indexer.query[...] * jnp.inf
  _, invalid = forward(model, models.random_tokens((2, 37)))
  assert all(invalid)
