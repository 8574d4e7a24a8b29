"""Chunks that hold several prompts, or several parts of one."""

import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from tests.support import models

# Four rows of two pages.
SIZES = dict(
  max_batch=6,
  page_size=4,
  num_pages=80,
  prefill_chunk=32,
  prefill_rows=4,
  max_length=64,
)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1, num_mtp_layers=0)


@pytest.fixture(scope="module")
def engine(model):
  return make(model)


def make(model, **changes):
  return engine_lib.Engine(model, engine_lib.EngineConfig(**SIZES | changes))


def prompt(length, seed):
  return np.random.default_rng(seed).integers(0, 61, length).tolist()


def ask(ids, seed=0, *, wants=True, max_tokens=4):
  return requests.Request(
    prompt_ids=ids,
    sampling=requests.SamplingParameters(max_tokens=max_tokens, seed=seed),
    want_routing=wants,
    want_selection=wants,
  )


def same(first, other):
  """Bit for bit, but for the id."""
  assert first.token_ids == other.token_ids
  assert first.logprobs == other.logprobs
  for name in ("experts_LNA", "selection_LNS"):
    one, two = getattr(first, name), getattr(other, name)
    assert (one is None) == (two is None)
    if one is not None:
      np.testing.assert_array_equal(one, two)


def step_until_drawn(engine, asked):
  """Returns the steps after which each request had its first token."""
  ids = [engine.submit(one) for one in asked]
  first, steps = {}, 0
  while engine.has_work:
    steps += 1
    for event in engine.step():
      first.setdefault(event.request_id, steps)
  return [first[name] for name in ids]


def test_a_step_takes_as_many_prompts_as_it_has_rows(model):
  engine = make(model)
  short = [ask(prompt(n, n), n) for n in (8, 3, 7, 1, 6)]
  assert step_until_drawn(engine, short) == [1, 1, 1, 1, 2]
  # A prompt of 20 takes three rows, one of 40 five.
  engine.load(model)
  mixed = [ask(prompt(n, n), n) for n in (20, 5, 40, 2)]
  assert step_until_drawn(engine, mixed) == [1, 1, 3, 3]


def test_parts_of_a_prompt_in_one_step_equal_parts_in_many(model):
  """With one row a step, a prompt's parts run one after the other."""
  asked = [ask(prompt(n, n), n) for n in (29, 11, 32, 8, 17)]
  apart = make(model, prefill_chunk=8, prefill_rows=1).generate(asked)
  for one, other in zip(apart, make(model).generate(asked), strict=True):
    assert one.token_ids == other.token_ids
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    np.testing.assert_array_equal(one.experts_LNA, other.experts_LNA)
    np.testing.assert_array_equal(one.selection_LNS, other.selection_LNS)


@pytest.mark.parametrize("wants", [True, False])
def test_a_group_shares_its_prompt_within_a_step(model, engine, wants):
  ids = prompt(13, 5)
  asked = [ask(ids, seed, wants=wants) for seed in range(3)]
  apart = []
  for one in asked:
    engine.load(model)
    apart.append(engine.generate([one])[0])
  engine.load(model)
  before = engine.stats()
  # Two rows of the first, and one row of what each other has of its own.
  assert step_until_drawn(engine, asked) == [1, 1, 1]
  after = engine.stats()
  assert after["shared_tokens"] - before["shared_tokens"] == 2 * 8
  assert after["prompt_tokens"] - before["prompt_tokens"] == 13 + 2 * 5
  engine.load(model)
  for one, other in zip(apart, engine.generate(asked), strict=True):
    same(one, other)


def test_a_prompt_without_records_serves_none_that_wants_them(model, engine):
  engine.load(model)
  ids = prompt(9, 6)
  asked = [ask(ids, 1, wants=False), ask(ids, 1, wants=False), ask(ids, 1)]
  bare, shared, full = engine.generate(asked)
  assert bare.experts_LNA is None is shared.experts_LNA
  assert full.experts_LNA.shape[1] == 9 + 3
  assert bare.token_ids == shared.token_ids == full.token_ids
  assert bare.logprobs == shared.logprobs == full.logprobs
  # The fuller record is what a later prompt finds.
  before = engine.stats()["shared_tokens"]
  same(engine.generate([asked[2]])[0], full)
  assert engine.stats()["shared_tokens"] - before == 8


def test_who_goes_amid_its_prompt_leaves_whole_pages_behind(model, engine):
  engine.load(model)
  long = ask(prompt(60, 8), 1, max_tokens=2)
  (want,) = engine.generate([long])
  engine.load(model)
  gone = engine.submit(long)
  assert engine.step() == []
  engine.cancel(gone)
  assert [event.finish_reason for event in engine.step()] == ["cancelled"]
  before = engine.stats()
  assert before["pages_used"] == 0
  (got,) = engine.generate([long])
  same(want, got)
  # All that the one step computed.
  assert engine.stats()["shared_tokens"] - before["shared_tokens"] == 32


@pytest.mark.parametrize("num_pages", [80, 24])
def test_a_crowd_gives_what_each_gives_alone(model, num_pages):
  """Few different beginnings, many lengths, and pages for some of them."""
  generator = np.random.default_rng(num_pages)
  asked = []
  for seed in range(24):
    head = prompt(8 * generator.integers(0, 4), generator.integers(2))
    tail = prompt(generator.integers(1, 20), 100 + seed)
    asked.append(ask(head + tail, seed, wants=bool(seed % 3), max_tokens=9))
  engine = make(model, num_pages=num_pages)
  together = engine.generate(asked)
  stats = engine.stats()
  assert stats["shared_tokens"] > 0 and stats["pages_used"] == 0
  assert (stats["preemptions"] > 0) == (num_pages == 24)
  for one, other in zip(asked, together, strict=True):
    engine.load(model)
    (alone,) = engine.generate([one])
    if num_pages == 80:
      same(alone, other)
    assert alone.token_ids == other.token_ids
    np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=1e-5)
