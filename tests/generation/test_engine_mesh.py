"""An engine over eight devices against one on a single device."""

import re

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from tests.support import models

pytestmark = pytest.mark.slow

SIZES = dict(
  max_batch=4, page_size=4, num_pages=40, prefill_chunk=8, max_length=48
)


def answers(model, **changes):
  engine = engine_lib.Engine(model, engine_lib.EngineConfig(**SIZES | changes))
  asked = [
    requests.Request(
      prompt_ids=np.random.default_rng(length).integers(0, 61, length),
      sampling=requests.SamplingParameters(
        max_tokens=6, seed=length, temperature=temperature, top_p=0.9
      ),
      want_routing=True,
      want_selection=True,
    )
    for length, temperature in ((21, 1.0), (1, 0.0), (9, 0.7), (16, 1.0))
  ]
  return engine, engine.generate(asked)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1, num_mtp_layers=0)


def on_mesh(model, **sizes):
  """The same model with its weights spread over all devices."""
  mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
  graph, state = nnx.split(model)
  layout = sharding.parameter_shardings(state, mesh)
  return nnx.merge(graph, jax.device_put(state, layout))


@pytest.mark.parametrize("index_key_format", ["model", "fp8"])
@pytest.mark.parametrize(
  "sizes", [dict(tensor=2, expert=4), dict(data=2, fsdp=2, tensor=2)]
)
def test_tokens_equal_those_of_one_device(model, sizes, index_key_format):
  _, want = answers(model, index_key_format=index_key_format)
  engine, got = answers(
    on_mesh(model, **sizes), index_key_format=index_key_format
  )
  for ours, theirs in zip(want, got, strict=True):
    assert ours.token_ids == theirs.token_ids
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    np.testing.assert_array_equal(ours.experts_LNA, theirs.experts_LNA)
    np.testing.assert_array_equal(ours.selection_LNS, theirs.selection_LNS)
  for array in jax.tree.leaves(engine._programs._pages):
    assert array.addressable_shards[0].data.size == array.size // 8
  _no_device_gathers_the_pages(engine)
  weights = jax.tree.leaves(engine._programs._state)
  # The experts' matrices, which are most of a large model.
  largest = max(weights, key=lambda leaf: leaf.size)
  assert largest.addressable_shards[0].data.size <= largest.size // 4


def _no_device_gathers_the_pages(engine):
  """Neither kind of step has an array of all pages in a device's program."""
  calls = []
  engine._programs._run, run = (
    lambda *args, **how: calls.append((args[2], how)) or run(*args, **how),
    engine._programs._run,
  )
  engine.warm_up()
  assert [how["is_chunk"] for _, how in calls] == [True, False]
  with jax.set_mesh(engine._programs._mesh):
    for call, how in calls:
      state, pages = engine._programs._state, engine._programs._pages
      text = run.lower(state, pages, call, **how).compile().as_text()
      assert "[5,4,16]" in text
      assert not re.search(r"\[(40,4|160),(16|8)\]", text)
