"""Who begins when on few pages; a stand-in for the model does the drawing."""

import types

import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import programs
from dsv32_jax.generation import requests
from dsv32_jax.generation import sampler

VOCABULARY = 61


class Drawing:
  """In place of a model's programs: draws ones, and drafts what it says."""

  most_adjusted = VOCABULARY

  def __init__(self, model, config):
    self.num_pages, self._draft = config.num_pages, model.draft
    self._speculate = config.speculate

  def __call__(self, call, *, is_chunk):
    rows, turns = call.tokens_BT.shape[0], 1 if is_chunk else 2
    ones = np.ones((rows, turns), np.int32)
    drawn = sampler.Drawn(ones, 0.0 * ones, None, None, None)
    draft_B = np.full(rows, self._draft) if self._speculate else None
    return programs.Result(drawn, draft_B, None, None)


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
  monkeypatch.setattr(programs, "Programs", Drawing)


def make(draft=1, **changes):
  sizes = dict(
    max_batch=8, page_size=4, prefill_chunk=16, prefill_rows=2, max_length=64
  )
  model = types.SimpleNamespace(
    config=types.SimpleNamespace(vocab_size=VOCABULARY), draft=draft
  )
  return engine_lib.Engine(model, engine_lib.EngineConfig(**sizes | changes))


def prompt(length, seed=0):
  return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def ask(ids, max_tokens=2):
  return requests.Request(
    prompt_ids=ids,
    sampling=requests.SamplingParameters(max_tokens=max_tokens),
  )


def run(engine):
  """Goes on to the end; returns how many ran at once, and events of ends."""
  most, ends = 0, []
  for _ in range(1000):
    if not engine.has_work:
      break
    ended = [event for event in engine.step() if event.finish_reason]
    most = max(most, engine.stats()["running"] + len(ended))
    ends.extend(ended)
  assert not engine.has_work and engine.stats()["pages_used"] == 0
  return most, ends


def run_all(engine, asked):
  for one in asked:
    engine.submit(one)
  most, ends = run(engine)
  assert len(ends) == len(asked)
  return most


def test_what_those_admitted_together_need_is_set_aside():
  # Prompts of 9 and a token behind them take 3 pages each, of 7.
  engine = make(num_pages=7)
  assert run_all(engine, [ask(prompt(9, n)) for n in range(5)]) == 2
  assert engine.stats()["preemptions"] == 0
  # An answer of one token is never run itself: 8 tokens take 2 pages.
  engine = make(num_pages=7)
  asked = [ask(prompt(8, n), max_tokens=1) for n in range(5)]
  run_all(engine, asked)
  assert engine.stats()["preemptions"] == 0


def test_a_long_prompt_under_way_keeps_what_it_will_need():
  engine = make(num_pages=12)
  engine.submit(ask(prompt(40)))  # 11 pages, over three steps
  engine.step()
  engine.submit(ask(prompt(9, 1)))
  most, ends = run(engine)
  assert (most, len(ends)) == (1, 2)
  assert engine.stats()["preemptions"] == 0


def test_pages_that_are_shared_are_set_aside_once():
  # Of a prompt of 21, 2 rows of 8 tokens are shared: 4 pages, and 2 of its own.
  engine = make(num_pages=4 + 6 * 2)
  assert run_all(engine, [ask(prompt(21), max_tokens=4)] * 6) == 6
  assert engine.stats()["preemptions"] == 0
  # Remembered, they cost the first that comes again, and no other.
  assert run_all(engine, [ask(prompt(21), max_tokens=4)] * 6) == 6
  assert engine.stats()["preemptions"] == 0
  assert run_all(make(num_pages=4 + 5 * 2 + 1), [ask(prompt(21))] * 6) == 5


@pytest.mark.parametrize("speculate,draft", [(False, 0), (True, 0), (True, 1)])
def test_no_budget_brings_preemptions_of_short_answers(speculate, draft):
  """Any lot of prompts whose answers end with the first step behind them."""
  generator = np.random.default_rng(0)
  for _ in range(60):
    engine = make(
      draft, num_pages=int(generator.integers(12, 40)), speculate=speculate
    )
    asked = []
    for seed in range(20):
      head = prompt(8 * generator.integers(0, 4), generator.integers(2))
      tail = prompt(generator.integers(1, 14), 100 + seed)
      # With a draft that is right, a step draws two.
      asked.append(ask(head + tail, max_tokens=2 + (speculate and draft)))
    run_all(engine, asked)
    assert engine.stats()["preemptions"] == 0


def test_long_answers_still_share_few_pages():
  """What they take later is not set aside: they give way, and all end."""
  engine = make(num_pages=14)
  assert run_all(engine, [ask(prompt(9, n), 40) for n in range(6)]) > 1
  assert engine.stats()["preemptions"] > 0
