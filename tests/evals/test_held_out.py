"""Scores equal a float64 computation, however rows and weights are spread."""

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.evals import held_out
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from tests.support import models
from tests.support import tolerances

OPTIONS = {
  "dense": attention.AttentionOptions(select=selection.DENSE),
  "top_k": attention.AttentionOptions(select=selection.TopK(6)),
}
# Neither a multiple of eight devices nor of a batch.
ROWS, LENGTH = 11, 24


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_mtp_layers=0)


@pytest.fixture(scope="module")
def rows():
  return np.asarray(models.random_tokens((ROWS, LENGTH), seed=3))


def batches(rows):
  return held_out.batches_of_rows(rows, 4)


def expected(model, rows, name):
  """Loss and arg max from the logits, in float64 numpy."""
  forward = jax.jit(lambda rows: model(rows, options=OPTIONS[name]).logits)
  logits = np.asarray(forward(rows), np.float64)[:, :-1]
  logits -= logits.max(axis=-1, keepdims=True)
  total = np.log(np.exp(logits).sum(axis=-1))
  targets = rows[:, 1:]
  loss = total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return loss, logits.argmax(axis=-1) == targets


@pytest.mark.parametrize("name", OPTIONS)
def test_pmap_equals_numpy(model, rows, name):
  assert jax.local_device_count() == 8
  scorer = held_out.PmapScorer(nnx.split(model)[0], OPTIONS[name])
  scores = scorer(model, batches(rows))
  loss, correct = expected(model, rows, name)
  assert scores.loss_RT.shape == (ROWS, LENGTH)
  tolerances.assert_close(scores.loss_RT[:, :-1], loss)
  np.testing.assert_array_equal(scores.correct_RT[:, :-1], correct)
  assert scores.tokens == loss.size
  np.testing.assert_allclose(scores.loss, loss.mean(), rtol=1e-5)
  np.testing.assert_allclose(scores.accuracy, correct.mean(), rtol=1e-6)
  np.testing.assert_allclose(
    scores.row_losses(5), loss[:, 5:].mean(axis=1), rtol=1e-5
  )


@pytest.mark.parametrize(
  "name, axes",
  [
    ("dense", dict(fsdp=8)),
    ("top_k", dict(fsdp=2, expert=2, context=2)),
  ],
)
def test_mesh_equals_pmap(model, rows, name, axes):
  graph, state = nnx.split(model)
  want = held_out.PmapScorer(graph, OPTIONS[name])(model, batches(rows))
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
  layout = jax.tree.map(lambda x: x.sharding, sharding.placed(state, mesh))
  spread = nnx.merge(graph, jax.device_put(state, layout))
  scorer = held_out.MeshScorer(graph, OPTIONS[name], mesh)
  got = scorer(spread, batches(rows))
  tolerances.assert_close(got.loss_RT, want.loss_RT)
  np.testing.assert_array_equal(got.correct_RT, want.correct_RT)
  np.testing.assert_array_equal(got.mask_RT, want.mask_RT)


def test_documents_are_kept_apart_and_padding_is_left_out(model):
  tokens = np.asarray(models.random_tokens((1, 20)))
  segments = np.array([[1] * 9 + [2] * 8 + [0] * 3])
  positions = np.array([[*range(9), *range(8), 0, 0, 0]])
  packed = batch_lib.from_packed(
    tokens, np.ones_like(tokens), segments, positions
  )
  scorer = held_out.PmapScorer(nnx.split(model)[0], OPTIONS["dense"])
  got = scorer(model, [packed])
  alone = [
    scorer(model, [batch_lib.from_documents([part], len(part))])
    for part in (tokens[0, :9], tokens[0, 9:17])
  ]
  assert got.tokens == sum(part.tokens for part in alone) == 15
  want = sum(part.loss * part.tokens for part in alone) / 15
  np.testing.assert_allclose(got.loss, want, rtol=1e-5)


def test_token_scores_in_slices(monkeypatch):
  generator = np.random.default_rng(0)
  hidden = generator.standard_normal((2, 12, 8)).astype(np.float32)
  kernel = generator.standard_normal((8, 17)).astype(np.float32)
  targets = generator.integers(0, 17, (2, 12)).astype(np.int32)
  whole = held_out.token_scores(hidden, kernel, targets)
  monkeypatch.setattr(held_out, "LOGIT_TOKENS", 7)
  sliced = held_out.token_scores(hidden, kernel, targets)
  for one, other in zip(whole, sliced):
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_rows_of_documents():
  documents = [[1] * 5, [2] * 9, [3] * 3, [4] * 8, [5] * 8]
  rows = held_out.document_rows(documents, 5, max_rows=3)
  assert rows.tolist() == [[1] * 5, [2] * 5, [4] * 5]
  with pytest.raises(ValueError, match="no document has length=10"):
    held_out.document_rows(documents, 10, max_rows=3)


def test_nothing_to_score(model):
  scorer = held_out.PmapScorer(nnx.split(model)[0], OPTIONS["dense"])
  with pytest.raises(ValueError, match="no row to score"):
    scorer(model, [])
  with pytest.raises(ValueError, match="no row has a target"):
    scorer(model, [batch_lib.padding(2, 8)])


def test_interval():
  values = np.array([1.0, 2.0, 4.0])
  mean, half = held_out.mean_and_interval(values)
  np.testing.assert_allclose(mean, 7 / 3)
  deviation = np.sqrt(sum((values - 7 / 3) ** 2) / 2)
  np.testing.assert_allclose(half, 1.96 * deviation / np.sqrt(3))
  assert np.isnan(held_out.mean_and_interval(values[:1])[1])
