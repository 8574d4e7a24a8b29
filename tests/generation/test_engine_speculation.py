"""Drafts of the MTP module change how fast tokens come, never which."""

import collections
import itertools

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from tests.support import models

# B batch, T tokens, V vocabulary

SIZES = dict(
  max_batch=4, page_size=4, num_pages=60, prefill_chunk=8, max_length=48
)
LENGTHS = (21, 1, 9, 16, 7)
# So that a draft is often right although the weights are random.
FEW = tuple(range(4, 61))


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1)


@pytest.fixture(scope="module")
def plain(model):
  return engine_lib.Engine(model, engine_lib.EngineConfig(**SIZES))


@pytest.fixture(scope="module")
def drafting(model):
  return make(model)


def make(model, **changes):
  config = engine_lib.EngineConfig(**SIZES | changes, speculate=True)
  return engine_lib.Engine(model, config)


def ask(length, seed, **sampling):
  ids = np.random.default_rng(length).integers(0, 61, length).tolist()
  return requests.Request(
    prompt_ids=ids,
    sampling=requests.SamplingParameters(seed=seed, **sampling),
    want_routing=True,
    want_selection=True,
  )


def same(ours, theirs):
  """Equal but for rounding: a step of two tokens adds in another order."""
  for one, other in zip(ours, theirs, strict=True):
    assert one.token_ids == other.token_ids
    assert one.finish_reason == other.finish_reason
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    for kept, others in zip(one.kept, other.kept, strict=True):
      np.testing.assert_array_equal(kept, others)
    np.testing.assert_array_equal(one.experts_LNA, other.experts_LNA)
    np.testing.assert_array_equal(one.selection_LNS, other.selection_LNS)


@pytest.mark.parametrize(
  "sampling",
  [
    dict(temperature=0.0),
    dict(temperature=0.0, banned_ids=FEW),
    dict(temperature=1.0),
    dict(temperature=0.8, top_p=0.7, min_p=0.05),
    dict(temperature=1.5, top_k=3, banned_ids=FEW),
  ],
)
def test_tokens_and_records_are_those_without_drafts(plain, drafting, sampling):
  asked = [ask(n, n, max_tokens=13, **sampling) for n in LENGTHS]
  want, got = plain.generate(asked), drafting.generate(asked)
  same(got, want)
  if "banned_ids" in sampling:
    # Four tokens are left, so that chance makes some drafts right.
    assert sum(one.num_accepted for one in got) > 0
  for one in got:
    assert 0 <= one.num_accepted <= one.num_drafted < 13
    assert one.num_drafted + one.num_accepted >= 11
  assert all(one.num_drafted == 0 for one in want)


def test_stats_count_drafts(drafting):
  before = drafting.stats()
  done = drafting.generate(
    [ask(n, n, max_tokens=9, banned_ids=FEW) for n in LENGTHS]
  )
  after = drafting.stats()
  for name in ("drafted", "accepted"):
    counted = sum(getattr(one, f"num_{name}") for one in done)
    assert after[f"{name}_tokens"] - before[f"{name}_tokens"] == counted > 0
  assert after["pages_used"] == 0


def test_every_draft_is_right_where_one_token_is_left(drafting):
  only = tuple(token for token in range(61) if token != 7)
  one, *_ = drafting.generate([ask(9, 1, max_tokens=8, banned_ids=only)])
  assert one.token_ids == (7,) * 8
  # The first token comes with the prompt, then three pairs, then one alone.
  assert (one.num_drafted, one.num_accepted) == (3, 3)


def test_an_answer_ends_between_a_token_and_its_draft(model):
  config = engine_lib.EngineConfig(**SIZES, speculate=True)
  engine = engine_lib.Engine(model, config, eos_id=2)
  asked = [
    ask(n, seed, max_tokens=20, banned_ids=FEW)
    for n in (5, 9)
    for seed in range(8)
  ]
  for one in engine.generate(asked):
    assert 2 not in one.token_ids[:-1]
    assert (one.token_ids[-1] == 2) == (one.finish_reason == "stop")
    length = len(one.prompt_ids) + len(one.token_ids) - 1
    assert one.experts_LNA.shape[1] == one.selection_LNS.shape[1] == length
  assert engine.stats()["pages_used"] == 0


def test_preemption_and_company_change_nothing(model, drafting):
  asked = [ask(9, seed, max_tokens=20, banned_ids=FEW) for seed in range(4)]
  together = drafting.generate(asked)
  alone = [drafting.generate([one])[0] for one in asked]
  for one, other in zip(together, alone, strict=True):
    assert one.token_ids == other.token_ids
    assert one.logprobs == other.logprobs
  tight = make(model, num_pages=14)
  same(tight.generate(asked), together)
  assert tight.stats()["preemptions"] > 0


def test_the_distribution_is_that_of_the_model(model, drafting):
  """Chi-square of three tokens against float64 products of whole forwards."""
  kept, count, temperature = 3, 1000, 1.3
  prompt = np.random.default_rng(5).integers(0, 61, 10).tolist()
  graph, state = nnx.split(model)
  run = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids).logits)

  def chances(answers):
    """What may be drawn behind each answer so far, and how likely it is."""
    ids_BT = np.zeros((9, 12), np.int32)
    for row, answer in enumerate(answers):
      ids_BT[row, : 10 + len(answer)] = [*prompt, *answer]
    logits_BTV = np.asarray(run(state, ids_BT), np.float64)
    for row, answer in enumerate(answers):
      logits_V = logits_BTV[row, 9 + len(answer), : 61 - len(FEW)] / temperature
      best = np.argsort(-logits_V, kind="stable")[:kept]
      chance = np.exp(logits_V[best] - logits_V[best].max())
      yield answer, dict(zip(best.tolist(), chance / chance.sum()))

  expected = {(): 1.0}
  for _ in range(3):
    found = list(chances(list(expected)))
    expected = {
      (*answer, token): expected[answer] * chance
      for answer, following in found
      for token, chance in following.items()
    }
  sampling = dict(
    max_tokens=3, top_k=kept, temperature=temperature, banned_ids=FEW
  )
  done = drafting.generate(
    [
      requests.Request(
        prompt_ids=prompt,
        sampling=requests.SamplingParameters(seed=seed, **sampling),
      )
      for seed in range(count)
    ]
  )
  seen = collections.Counter(one.token_ids for one in done)
  assert set(seen) <= set(expected)
  # Rare outcomes are one class: the statistic wants five in each.
  classes = collections.Counter()
  for answer, chance in expected.items():
    rare = chance * count < 5
    classes["rare" if rare else answer, "want"] += chance * count
    classes["rare" if rare else answer, "got"] += seen[answer]
  names = {name for name, _ in classes}
  statistic = sum(
    (classes[name, "got"] - classes[name, "want"]) ** 2 / classes[name, "want"]
    for name in names
  )
  # The 99.9% quantile by Wilson and Hilferty; fixed seeds, so no flakes.
  freedom = len(names) - 1
  assert freedom >= 8
  spread = 2 / (9 * freedom)
  assert statistic < freedom * (1 - spread + 3.09 * spread**0.5) ** 3
  accepted = sum(one.num_accepted for one in done)
  drafted = sum(one.num_drafted for one in done)
  assert 0.05 * drafted < accepted < 0.95 * drafted


def test_drafts_follow_the_modules_own_forward(model, drafting):
  """Greedy drafts against the module over the whole sequence, uncached."""
  (one,) = drafting.generate([ask(9, 1, max_tokens=12, temperature=0.0)])
  drafts = record_drafts(drafting, ask(9, 1, max_tokens=12, temperature=0.0))
  ids = [*one.prompt_ids, *one.token_ids]
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, tokens_BT):
    model = nnx.merge(graph, state)
    output = model(tokens_BT)
    hidden_BTD, _ = model.predict_further(output, tokens_BT)
    return model.head(hidden_BTD)

  logits_TV = np.asarray(run(state, np.asarray([ids], np.int32)))[0]
  best = logits_TV.argmax(-1)
  assert len(drafts) > 5
  for length, draft in drafts:
    assert draft == best[length - 2]


def record_drafts(engine, request):
  """Pairs of a number of tokens and the draft of the one behind them."""
  found = []
  engine.submit(request)
  (one,) = engine._live.values()
  while engine.has_work:
    engine.step()
    if one.num_drawn:
      found.append((len(one.tokens), one.draft))
  return list(itertools.takewhile(lambda pair: pair[0] < 21, found))


def test_a_model_without_the_module_is_refused():
  model = models.tiny_model(num_layers=1, num_mtp_layers=0)
  with pytest.raises(ValueError, match=r"speculate=True.*num_mtp_layers=0"):
    make(model)


def test_the_memory_budget_counts_the_modules_cache(model):
  page = 3 * 4 * (16 + 8 + 16) * 4
  engine = make(model, num_pages=None, memory_budget_bytes=5 * page + 1)
  assert engine.stats()["pages_free"] == 5
