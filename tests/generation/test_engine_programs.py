"""What the engine compiles, and that its choice of program shows nowhere."""

import jax
import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import programs
from dsv32_jax.generation import requests
from tests.support import models

SIZES = dict(
  max_batch=3, page_size=4, num_pages=40, prefill_chunk=8, max_length=48
)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1, num_mtp_layers=0)


def ask(length, seed, *, max_tokens, **sampling):
  ids = np.random.default_rng(seed).integers(0, 61, length).tolist()
  return requests.Request(
    prompt_ids=ids,
    sampling=requests.SamplingParameters(
      max_tokens=max_tokens, seed=seed, **sampling
    ),
    want_routing=True,
    want_selection=True,
  )


@pytest.mark.parametrize(
  "index_key_format", ["model", pytest.param("fp8", marks=pytest.mark.slow)]
)
def test_a_longer_table_changes_no_bit(model, index_key_format):
  """A short request alone, and beside one that needs the longest table."""
  sizes = SIZES | dict(index_key_format=index_key_format)
  config = engine_lib.EngineConfig(**sizes, page_counts=(3, 12))
  engine = engine_lib.Engine(model, config)
  used = []
  run = engine._programs._run

  def watched(state, pages, call, **how):
    used.append(call.table_BM.shape[1])
    return run(state, pages, call, **how)

  engine._programs._run = watched
  short = ask(5, 1, max_tokens=7, top_p=0.8)
  (alone,) = engine.generate([short])
  assert set(used) == {3}
  together = engine.generate([ask(37, 2, max_tokens=9), short])[1]
  assert set(used) == {3, 12}
  assert alone.token_ids == together.token_ids
  assert alone.logprobs == together.logprobs
  np.testing.assert_array_equal(alone.experts_LNA, together.experts_LNA)
  np.testing.assert_array_equal(alone.selection_LNS, together.selection_LNS)


def test_nothing_is_compiled_after_the_warm_up(model):
  # Whatever other engines have compiled in this process.
  programs._compiled.cache_clear()
  config = engine_lib.EngineConfig(**SIZES, page_counts=(3, 12))
  engine = engine_lib.Engine(model, config)
  compiled = []

  def listen(event, duration, **_):
    del duration
    if event.endswith("backend_compile_duration"):
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    engine.warm_up()
    # A prompt's chunk and a token of each sequence, for each number of pages.
    assert len(compiled) == 4
    assert engine.stats()["pages_used"] == 0
    for count in (1, 2, 3, 5):
      engine.generate(
        [
          ask(9 * n + 1, n, top_k=n, max_tokens=n + 1, min_p=0.1 * n)
          for n in range(count)
        ]
      )
    engine.load(model)
    engine.generate([ask(20, 3, max_tokens=20, temperature=0.0)])
    changed = dict(presence_penalty=1.0, logit_bias={4: 2.0}, top_logprobs=3)
    engine.generate([ask(9, 4, max_tokens=3, **changed)])
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(compiled) == 4


@pytest.mark.parametrize(
  "page_size,max_length,counts",
  [(64, 4096, (16, 32, 64)), (64, 5000, (16, 32, 64, 79)), (4, 48, (12,))],
)
def test_numbers_of_pages_double(page_size, max_length, counts):
  config = programs.EngineConfig(
    max_batch=1, page_size=page_size, num_pages=1, max_length=max_length
  )
  assert config.compiled_page_counts == counts


def test_engines_of_one_shape_share_what_is_compiled(model):
  config = engine_lib.EngineConfig(**SIZES)
  one, other, eight_bit = (
    engine_lib.Engine(model, x)
    for x in (
      config,
      config,
      engine_lib.EngineConfig(**SIZES | dict(index_key_format="fp8")),
    )
  )
  assert one._programs._run is other._programs._run
  assert eight_bit._programs._run is not one._programs._run
