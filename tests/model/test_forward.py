"""The forward's modes agree with each other."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import selection
from dsv32_jax.model import transformer
from tests.support import models
from tests.support import tolerances

RTOL, ATOL = tolerances.TOLERANCE["float32"]


def close(got, want):
  np.testing.assert_allclose(
    got, want, rtol=RTOL, atol=ATOL * float(np.abs(want).max())
  )


def options(select, **changes):
  return attention.AttentionOptions(select=select, **changes)


@functools.partial(jax.jit, static_argnames=("options", "record"))
def forward(model, tokens, **inputs):
  """One program: op by op, the forward compiles hundreds."""
  return model(tokens, **inputs)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model()


@pytest.fixture(scope="module")
def tokens():
  return models.random_tokens((2, 37))


@pytest.fixture(scope="module")
def sparse_logits(model, tokens):
  return np.asarray(model(tokens).logits)


@pytest.mark.parametrize("form", ["expanded", "absorbed", "gathered"])
def test_forms_agree_when_sparse(model, tokens, sparse_logits, form):
  got = forward(
    model, tokens, options=options(selection.TopK(6), form=form)
  ).logits
  close(got, sparse_logits)


def test_absorbed_equals_expanded_when_dense(model, tokens):
  got = [
    forward(model, tokens, options=options(selection.DENSE, form=form)).logits
    for form in ("absorbed", "expanded")
  ]
  close(got[0], got[1])


def test_sparse_differs_from_dense(model, tokens, sparse_logits):
  dense = forward(model, tokens, options=options(selection.DENSE)).logits
  assert np.abs(dense - sparse_logits).max() > 0.05 * np.abs(dense).max()
  # The first queries see no more keys than they may select.
  close(dense[:, :6], sparse_logits[:, :6])


@pytest.mark.parametrize("top_k", [37, 1000])
def test_sparse_equals_dense_when_everything_is_selected(model, tokens, top_k):
  dense = forward(model, tokens, options=options(selection.DENSE)).logits
  sparse = forward(model, tokens, options=options(selection.TopK(top_k))).logits
  close(sparse, dense)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("chunks", [(37,), (20, 17), (36, 1), (5, 1, 1, 30)])
def test_cached_equals_uncached(model, tokens, sparse_logits, stacked, chunks):
  runner = model if stacked else model.unstacked()
  cache = cache_lib.empty_cache(model.config, 2, 40, stacked=stacked)
  logits, start = [], 0
  for size in chunks:
    output = forward(runner, tokens[:, start : start + size], cache=cache)
    logits.append(output.logits)
    cache, start = output.cache, start + size
  close(np.concatenate(logits, axis=1), sparse_logits)
  assert cache.length_B.tolist() == [37, 37]


def test_sequences_of_different_lengths_share_a_cache(model, tokens):
  cache = cache_lib.empty_cache(model.config, 2, 40)
  cache = forward(model, tokens[:, :20], cache=cache).cache
  # The second sequence forgets its last 8 tokens and goes on elsewhere.
  cache = cache._replace(length_B=jnp.array([20, 12], jnp.int32))
  following = jnp.stack([tokens[0, 20:25], tokens[0, 5:10]])
  got = forward(model, following, cache=cache).logits
  close(got[0], forward(model, tokens[:1, :25]).logits[0, 20:])
  alone = jnp.concatenate([tokens[1, :12], tokens[0, 5:10]])[None]
  close(got[1], forward(model, alone).logits[0, 12:])


@pytest.mark.parametrize(
  "select",
  [
    selection.TopK(6),
    selection.DENSE,
    selection.Window(6),
  ],
)
def test_packed_documents_do_not_see_each_other(model, tokens, select):
  lengths = (11, 20, 6)
  row = jnp.concatenate([jnp.full((n,), i + 1) for i, n in enumerate(lengths)])
  positions = jnp.concatenate([jnp.arange(n) for n in lengths])
  packed = forward(
    model,
    tokens[:1],
    positions_BT=positions[None],
    segments_BT=row[None].astype(jnp.int32),
    options=options(select),
  ).logits[0]
  start = 0
  for length in lengths:
    alone = tokens[:1, start : start + length]
    want = forward(model, alone, options=options(select)).logits[0]
    close(packed[start : start + length], want)
    start += length


def test_padding_changes_nothing_and_has_no_nan(model, tokens, sparse_logits):
  segments = jnp.ones((2, 37), jnp.int32).at[:, 30:].set(0)
  output = forward(model, tokens, segments_BT=segments)
  close(output.logits[:, :30], sparse_logits[:, :30])
  assert np.isfinite(output.logits).all()
  assert int(output.moe.load_E.sum()) == 2 * 2 * 30 * 3


@pytest.mark.parametrize("form", ["expanded", "gathered"])
def test_replay_repeats_what_was_recorded(model, tokens, form):
  chosen = options(selection.TopK(6), form=form)
  first = forward(model, tokens, options=chosen, record=True)
  replay = transformer.Replay(
    selection=first.gather("selection"), experts=first.moe.experts_BTA
  )
  other = models.tiny_model(seed=0)
  # A router and an indexer that would choose otherwise.
  router = other.moe_layers.ffn.expert_bias
  router[...] = -router[...] * 3
  query = other.moe_layers.attention.indexer.query
  query[...] = -query[...]
  for played in ("expanded", "gathered"):
    again = forward(
      other,
      tokens,
      options=options(selection.TopK(6), form=played),
      replay=replay,
    )
    close(again.logits, first.logits)
  without = forward(other, tokens, options=chosen)
  assert np.abs(without.logits - first.logits).max() > 0.01


@pytest.mark.parametrize("select", [selection.Window(6), selection.Random(6)])
def test_controls_select_as_many_visible_keys(model, tokens, select):
  output = forward(model, tokens, options=options(select), record=True)
  words = np.asarray(output.gather("selection"))
  counts = np.bitwise_count(words).sum(-1)
  want = np.minimum(np.arange(37) + 1, 6)
  assert (counts == want).all()
  gathered = forward(model, tokens, options=options(select, form="gathered"))
  close(gathered.logits, output.logits)


def test_random_selection_differs_by_layer_and_query(model, tokens):
  select = options(selection.Random(6))
  words = np.asarray(
    forward(model, tokens, options=select, record=True).gather("selection")
  )
  assert (words[0] != words[1]).any() and (words[1] != words[2]).any()
  assert (words[:, 0, 30] != words[:, 0, 36]).any()


def test_mtp_sees_the_next_token_only(model, tokens):
  output = model(tokens)
  hidden, _ = model.predict_further(output, tokens)
  changed = tokens.at[:, 21].add(1) % 61
  other, _ = model.predict_further(model(changed), changed)
  same = np.asarray(hidden == other).all(-1)
  assert same[:, :20].all() and not same[:, 20].any()


def test_unknown_form_and_gathered_dense_are_refused():
  with pytest.raises(ValueError, match="form='ring'"):
    options(selection.TopK(6), form="ring")
  with pytest.raises(ValueError, match="needs a selection"):
    options(selection.DENSE, form="gathered")


def test_nan_weights_are_reported(model, tokens):
  broken = models.tiny_model()
  weight = broken.dense_layers.attention.indexer.weight
  weight[...] = weight[...] * jnp.nan
  output = forward(broken, tokens)
  assert bool(output.dense.invalid_BT.all())


def test_jit_takes_the_model_as_an_argument(model, tokens, sparse_logits):
  got = jax.jit(lambda model, tokens: model(tokens).logits)(model, tokens)
  close(got, sparse_logits)


def test_compute_dtype_follows_the_parameters(tokens):
  model = models.tiny_model(dtype=jnp.bfloat16)
  output = model(tokens)
  assert output.hidden.dtype == jnp.bfloat16
  assert output.logits.dtype == jnp.float32
  norm = model.dense_layers.attention.indexer.key_norm
  assert norm.bias[...].dtype == jnp.float32


def test_shapes_can_be_described_without_memory():
  config = dataclasses.replace(models.tiny_config(), num_experts=2**20)
  abstract = nnx.eval_shape(
    lambda: transformer.Transformer(config, rngs=nnx.Rngs(0))
  )
  gate = abstract.moe_layers.ffn.gate.get_value()
  assert gate.shape == (2, 2**20, 32, 24)
