"""Where a query may have every key, none is scored: the choice is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import indexer
from dsv32_jax.model import selection
from pallas_kernels import index_select

KEYS = 40
SLOTS = jnp.array([[0, 7, 39, -1], [3, 38, 20, 45]], jnp.int32)
SEGMENTS = jnp.where(jnp.arange(KEYS) < 17, 1, 2)[None].repeat(2, axis=0)


def inputs():
  shapes = (2, 4, 3, 8), (2, KEYS, 8), (2, 4, 3)
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes)]


def chosen(k, sight, *, want_indices):
  query, key, weight = inputs()
  return selection.TopK(k)(
    indexer.IndexInputs(query, None, weight),
    key,
    sight,
    layer=0,
    want_indices=want_indices,
  )


def sight_of(segments):
  if segments is None:
    return selection.Visibility(SLOTS, None, None)
  own = jnp.take_along_axis(segments, jnp.clip(SLOTS, 0, KEYS - 1), axis=1)
  return selection.Visibility(SLOTS, own, segments)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("k", [KEYS, KEYS + 9])
def test_it_is_what_the_scores_would_choose(k, segments):
  sight = sight_of(segments)
  query, key, weight = inputs()
  scored = index_select.index_select(
    *(query, key, weight, SLOTS),
    top_k=k,
    query_segments_BT=sight.query_segments_BT,
    key_segments_BS=sight.key_segments_BS,
    want_indices=True,
    implementation="ref",
  )
  listed = chosen(k, sight, want_indices=True)
  np.testing.assert_array_equal(listed.indices_BTN, scored.indices_BTN)
  marked = chosen(k, sight, want_indices=False)
  np.testing.assert_array_equal(marked.mask_BTW, scored.mask_BTW)
  assert not listed.invalid_BT.any() and not marked.invalid_BT.any()


@pytest.mark.parametrize("want_indices", [True, False])
def test_nothing_is_scored(want_indices):
  def text(k):
    sight = sight_of(None)
    run = lambda: chosen(k, sight, want_indices=want_indices)
    return str(jax.make_jaxpr(run)())

  assert "dot_general" in text(KEYS - 1)
  assert "dot_general" not in text(KEYS)
  assert "sort" not in text(KEYS)
