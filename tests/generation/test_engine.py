"""The engine against whole forwards of the model, without a cache."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.model import transformer
from tests.support import models

# B batch, T tokens, N tokens, L layers, A experts a token, V vocabulary

SIZES = dict(
  max_batch=3, page_size=4, num_pages=40, prefill_chunk=8, max_length=48
)
# The model's top_k is 6: all but the first few queries select.
LENGTHS = (21, 1, 9, 16)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1, num_mtp_layers=0)


@pytest.fixture(scope="module")
def engine(model):
  return make(model)


@pytest.fixture(scope="module")
def forward(model):
  """A function of ids, Replay and whether to quantise to a ModelOutput."""
  graph, state = nnx.split(model)

  @functools.partial(jax.jit, static_argnames="quantized")
  def run(state, tokens_BT, replay, quantized):
    options = attention.AttentionOptions(
      select=selection.TopK(model.config.index_top_k), index_quantized=quantized
    )
    return nnx.merge(graph, state)(
      tokens_BT, replay=replay, options=options, record=True
    )

  def call(ids, done=None, quantized=False):
    # Later tokens are not seen, so that one length serves all.
    tokens_BT = np.zeros((1, 32), np.int32)
    tokens_BT[0, : len(ids)] = ids
    selection_LBTN = np.zeros((2, 1, 32, 6), np.int32)
    experts_LBTA = np.zeros((1, 1, 32, 3), np.int32)
    if done is None:
      return run(state, tokens_BT, transformer.Replay(), quantized)
    selection_LBTN[:, 0, : len(ids)] = done.selection_LNS
    experts_LBTA[:, 0, : len(ids)] = done.experts_LNA
    replay = transformer.Replay(selection_LBTN, experts_LBTA)
    return run(state, tokens_BT, replay, quantized)

  return call


def make(model, **changes):
  return engine_lib.Engine(model, engine_lib.EngineConfig(**SIZES | changes))


def prompt(length, seed=0):
  return np.random.default_rng(seed).integers(0, 61, length).tolist()


def ask(ids, *, max_tokens=6, wants=False, **sampling):
  return requests.Request(
    prompt_ids=ids,
    sampling=requests.SamplingParameters(max_tokens=max_tokens, **sampling),
    want_routing=wants,
    want_selection=wants,
  )


def log_softmax(logits_NV):
  logits_NV = np.float64(logits_NV)
  shifted_NV = logits_NV - logits_NV.max(-1, keepdims=True)
  return shifted_NV - np.log(np.exp(shifted_NV).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk,index_key_format", [(4, "model"), (16, "fp8")])
def test_logprobs_equal_the_training_forward(
  model, forward, chunk, index_key_format
):
  engine = make(model, prefill_chunk=chunk, index_key_format=index_key_format)
  _compare_with_forward(engine, forward, index_key_format == "fp8")


def test_logprobs_of_the_shared_engine(engine, forward):
  _compare_with_forward(engine, forward, False)


def _compare_with_forward(engine, forward, quantized):
  asked = [
    ask(prompt(n, seed=n), wants=True, seed=n, max_tokens=9) for n in LENGTHS
  ]
  gaps = []
  for one in engine.generate(asked):
    ids = [*one.prompt_ids, *one.token_ids][:-1]
    assert one.experts_LNA.shape == (1, len(ids), 3)
    assert one.selection_LNS.shape == (2, len(ids), 6)
    assert one.finish_reason == "length" and len(one.token_ids) == 9
    free = forward(ids, quantized=quantized)
    np.testing.assert_array_equal(
      np.asarray(free.moe.experts_BTA)[:, 0, : len(ids)], one.experts_LNA
    )
    bound = forward(ids, one, quantized=quantized)
    logp_NV = log_softmax(bound.logits[0, len(one.prompt_ids) - 1 : len(ids)])
    wanted_N = logp_NV[np.arange(9), one.token_ids]
    gaps.extend(np.abs(wanted_N - one.logprobs))
  assert max(gaps) < 1e-4 and np.mean(gaps) < 1e-5


def test_greedy_equals_the_argmax_of_whole_forwards(engine, forward):
  asked = [ask(prompt(n, seed=9), temperature=0) for n in LENGTHS]
  for one in engine.generate(asked):
    ids = [*one.prompt_ids, *one.token_ids]
    logits_NV = np.asarray(forward(ids[:-1]).logits)[0]
    first = len(one.prompt_ids) - 1
    best_N = logits_NV[first : len(ids) - 1].argmax(-1)
    assert one.token_ids == tuple(best_N)
    assert one.logprobs == (0.0,) * 6
    assert [kept.tolist() for kept in one.kept] == [[t] for t in one.token_ids]


def test_results_do_not_depend_on_the_company(engine):
  asked = [
    ask(prompt(n, seed=n), wants=True, seed=n, top_p=0.8, max_tokens=7)
    for n in LENGTHS
  ]
  alone = [engine.generate([one])[0] for one in asked]
  together = engine.generate(asked)
  backwards = engine.generate(asked[::-1])[::-1]
  for first, *others in zip(alone, together, backwards):
    for other in others:
      same(first, other)


def same(first, other):
  """Bit for bit, but for the id."""
  assert first.token_ids == other.token_ids
  assert first.logprobs == other.logprobs
  assert first.finish_reason == other.finish_reason
  for a, b in zip(first.kept, other.kept, strict=True):
    np.testing.assert_array_equal(a, b)
  for name in ("experts_LNA", "selection_LNS"):
    np.testing.assert_array_equal(getattr(first, name), getattr(other, name))


def test_a_group_shares_its_prompt(model, engine):
  ids = prompt(21, seed=77)
  asked = [ask(ids, wants=True, seed=n) for n in range(4)]
  apart = []
  for one in asked:
    # Weights taken anew: nothing is remembered.
    engine.load(model)
    apart.append(engine.generate([one])[0])
  engine.load(model)
  before = engine.stats()
  group = engine.generate(asked)
  after = engine.stats()
  # Five rows of 4 are shared by three; the last token each runs itself.
  assert after["shared_tokens"] - before["shared_tokens"] == 3 * 20
  assert after["prompt_tokens"] - before["prompt_tokens"] == 21 + 3
  for first, other in zip(apart, group):
    same(first, other)
  assert len({one.token_ids for one in group}) > 1


def test_preemption_loses_nothing(model, engine):
  asked = [
    ask(prompt(9, seed=n), wants=True, seed=n, max_tokens=20) for n in range(3)
  ]
  wanted = engine.generate(asked)
  # Three sequences of 29 tokens need 24 pages.
  tight = make(model, num_pages=12)
  got = tight.generate(asked)
  assert tight.stats()["preemptions"] > 0
  assert tight.stats()["pages_used"] == 0
  for one, other in zip(wanted, got):
    assert one.token_ids == other.token_ids
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    np.testing.assert_array_equal(one.experts_LNA, other.experts_LNA)
    np.testing.assert_array_equal(one.selection_LNS, other.selection_LNS)


def test_requests_join_leave_and_are_cancelled(engine):
  long = ask(prompt(9, seed=1), max_tokens=20, seed=1)
  (alone,) = engine.generate([long])
  first = engine.submit(long)
  events = [*engine.step(), *engine.step(), *engine.step()]
  second = engine.submit(ask(prompt(3), max_tokens=30))
  third = engine.submit(ask(prompt(17, seed=3), max_tokens=3))
  events.extend(engine.step() + engine.step())
  engine.cancel(second)
  with pytest.raises(ValueError, match="not live"):
    engine.cancel(second)
  while engine.has_work:
    events.extend(engine.step())
  ends = {e.request_id: e.finish_reason for e in events if e.finish_reason}
  assert ends == {first: "length", second: "cancelled", third: "length"}
  mine = [event for event in events if event.request_id == first]
  assert tuple(event.token_id for event in mine) == alone.token_ids
  assert tuple(event.logprob for event in mine) == alone.logprobs
  stats = engine.stats()
  assert stats["pages_used"] == stats["running"] == stats["waiting"] == 0


def test_where_an_answer_ends(model):
  letters = "".join(chr(33 + n) for n in range(61))
  eos = engine_lib.Engine(
    model,
    engine_lib.EngineConfig(**SIZES),
    eos_id=49,
    detokenize=lambda ids: "".join(letters[n] for n in ids),
  )
  ids, options = prompt(5), dict(max_tokens=40, seed=3)
  (whole,) = eos.generate([ask(ids, ignore_eos=True, **options)])
  assert len(whole.token_ids) == 40 and 49 in whole.token_ids
  end = whole.token_ids.index(49) + 1
  (ended,) = eos.generate([ask(ids, **options)])
  assert (ended.token_ids, ended.finish_reason) == (
    whole.token_ids[:end],
    "stop",
  )
  stop = "".join(letters[n] for n in whole.token_ids[20:23])
  (cut,) = eos.generate([ask(ids, ignore_eos=True, stop=(stop,), **options)])
  assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:23], "stop")


@pytest.mark.parametrize(
  "ids,changes,message",
  [
    ([], {}, "empty"),
    ([61], {}, "token=61 is outside"),
    ([-1], {}, "token=-1 is outside"),
    ([1.7, 2], {}, "token=1.7 must be an integer"),
    (["a"], {}, "token='a' must be an integer"),
    ([1], dict(max_tokens=48), "exceed max_length=48"),
    ([1], dict(banned_ids=(61,)), "token=61 is outside"),
    ([1], dict(banned_ids=tuple(range(61))), "every token"),
    ([1], dict(stop=("a",)), "needs a detokenizer"),
  ],
)
def test_bad_requests(engine, ids, changes, message):
  with pytest.raises(ValueError, match=message):
    engine.submit(ask(ids, **changes))
  assert not engine.has_work


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(top_k=2**31), "top_k=2147483648"),
    (dict(stop=("\ud800",)), "no Unicode"),
    (dict(temperature=1e39), r"temperature=1e\+39"),
    (dict(temperature=1e-50), "temperature=1e-50"),
    (dict(temperature=float("nan")), "temperature=nan"),
  ],
)
def test_bad_parameters(changes, message):
  with pytest.raises(ValueError, match=message):
    ask([1], **changes)


def named(ids, name, **changes):
  return dataclasses.replace(ask(ids, **changes), request_id=name)


def test_ids_of_requests(engine):
  with pytest.raises(ValueError, match="twice"):
    engine.generate([named([1], "a"), named([2], "a")])
  with pytest.raises(ValueError, match=r"request_id=\[\]"):
    engine.submit(named([1], []))
  assert not engine.has_work

  # An id is free when the last event of its request has been given out.
  engine.submit(named([1], "a"))
  engine.cancel("a")
  with pytest.raises(ValueError, match="in use"):
    engine.submit(named([1], "a"))
  assert [e.finish_reason for e in engine.step()] == ["cancelled"]

  # Nobody's choice of an id is in the way of those that the engine picks.
  first = engine.submit(ask([1]))
  taken = first.removesuffix(first.split("-")[1])
  number = int(first.split("-")[1])
  engine.submit(named([1], f"{taken}{number + 2}"))
  others = {engine.submit(ask([1])) for _ in range(2)}
  assert len(others | {first, f"{taken}{number + 2}"}) == 4
  while engine.has_work:
    engine.step()


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(max_batch=0), "max_batch=0"),
    (dict(prefill_chunk=6), "multiple of"),
    (dict(prefill_rows=0), "prefill_rows=0"),
    (dict(prefill_rows=3), "prefill_rows=3"),
    (dict(memory_budget_bytes=9), "exactly one"),
    (dict(index_key_format="int4"), "index_key_format='int4'"),
    (dict(num_pages=None, memory_budget_bytes=9), "no page"),
    (dict(page_counts=()), r"page_counts=\(\)"),
    (dict(page_counts=(0, 12)), "page_counts=.*positive"),
    (dict(page_counts=(2, 4)), "end with 12"),
  ],
)
def test_bad_sizes(model, changes, message):
  with pytest.raises(ValueError, match=message):
    make(model, **changes)


def test_a_memory_budget_counts_every_array(model):
  for index_key_format, index in (("model", 16 * 4), ("fp8", 16 + 4)):
    page = 2 * 4 * ((16 + 8) * 4 + index)
    engine = make(
      model,
      num_pages=None,
      memory_budget_bytes=5 * page + 1,
      index_key_format=index_key_format,
    )
    assert engine.stats()["pages_free"] == 5
