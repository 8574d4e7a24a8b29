"""Penalties, biases, constraints and likeliest tokens through the engine."""

import collections

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.rl import trajectory
from tests.support import models

# T tokens, V vocabulary

SIZES = dict(
  max_batch=3, page_size=4, num_pages=40, prefill_chunk=8, max_length=48
)
PROMPT = (3, 14, 15, 9, 26, 5, 35, 8, 9)
MANY = dict(max_tokens=20, presence_penalty=0.7, frequency_penalty=0.4)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_dense_layers=1)


@pytest.fixture(scope="module")
def engine(model):
  return engine_lib.Engine(model, engine_lib.EngineConfig(**SIZES))


@pytest.fixture(scope="module")
def logits_of(model):
  """A function of ids to logits_TV of a whole forward, in float64."""
  options = attention.AttentionOptions(
    select=selection.TopK(model.config.index_top_k)
  )
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, tokens_BT):
    return nnx.merge(graph, state)(tokens_BT, options=options).logits[0]

  def call(ids):
    tokens_BT = np.zeros((1, 32), np.int32)
    tokens_BT[0, : len(ids)] = ids
    return np.float64(run(state, tokens_BT))[: len(ids)]

  return call


def ask(constraint=None, **sampling):
  return requests.Request(
    prompt_ids=PROMPT,
    sampling=requests.SamplingParameters(**dict(seed=3) | sampling),
    constraint=constraint,
  )


def logp_of(logits_V):
  shifted_V = logits_V - logits_V.max()
  return shifted_V - np.log(np.exp(shifted_V).sum())


def events_of(engine, request):
  engine.submit(request)
  events = []
  while engine.has_work:
    events += engine.step()
  return events


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_penalties_and_biases_are_those_of_the_definition(
  engine, logits_of, temperature
):
  bias = {7: 1.5, 30: 2.0, 31: -100.0}
  given = dict(temperature=temperature, logit_bias=bias, top_logprobs=4)
  events = events_of(engine, ask(**MANY | given))
  drawn = [event.token_id for event in events]
  logits_TV = logits_of([*PROMPT, *drawn])[len(PROMPT) - 1 :]
  times = collections.Counter()
  for event, logits_V in zip(events, logits_TV):
    for token, value in bias.items():
      logits_V[token] += value
    for token, count in times.items():
      logits_V[token] -= 0.7 + 0.4 * count
    if temperature == 0:
      assert event.token_id == logits_V.argmax() and event.logprob == 0
      assert event.top_logprobs == ((event.token_id, 0.0),)
    else:
      logp_V = logp_of(logits_V)
      assert event.logprob == pytest.approx(logp_V[event.token_id], abs=1e-4)
      best = np.argsort(-logp_V)[:4]
      assert [token for token, _ in event.top_logprobs] == best.tolist()
      values = [value for _, value in event.top_logprobs]
      np.testing.assert_allclose(values, logp_V[best], atol=1e-4)
    times[event.token_id] += 1
  # Some came again although it was penalised.
  assert max(times.values()) > 1


def test_a_penalised_request_changes_no_other(engine):
  plain = ask(max_tokens=9)
  (alone,) = engine.generate([plain])
  _, together = engine.generate([ask(**MANY), plain])
  assert alone.token_ids == together.token_ids
  assert alone.logprobs == together.logprobs


def test_a_lack_of_pages_forgets_no_penalty(model, engine):
  asked = [ask(**MANY | dict(seed=seed)) for seed in range(3)]
  tight = engine_lib.Engine(
    model, engine_lib.EngineConfig(**SIZES | dict(num_pages=12))
  )
  got = tight.generate(asked)
  assert tight.stats()["preemptions"] > 0
  for one, other in zip(engine.generate(asked), got, strict=True):
    assert one.token_ids == other.token_ids


class Spelled:
  """Allows one sequence of tokens, and then all."""

  def __init__(self, *tokens):
    self.tokens, self.seen = tokens, []

  def allowed(self, drawn):
    self.seen.append(tuple(drawn))
    if len(drawn) >= len(self.tokens):
      return None
    allowed_W = np.zeros(2, np.uint32)
    token = self.tokens[len(drawn)]
    allowed_W[token // 32] = 1 << (token % 32)
    return allowed_W


def test_a_constraint_decides_and_the_rest_is_drawn_behind_it(
  engine, logits_of
):
  spelled = Spelled(40, 0, 17)
  free = ask(max_tokens=8, seed=9)
  (alone,) = engine.generate([free])
  one, other = engine.generate([ask(spelled, max_tokens=8), free])
  assert one.token_ids[:3] == (40, 0, 17) and one.logprobs[:3] == (0.0,) * 3
  assert [kept.tolist() for kept in one.kept[:3]] == [[40], [0], [17]]
  logits_TV = logits_of([*PROMPT, *one.token_ids])[len(PROMPT) - 1 :]
  for place in range(3, 8):
    logp = logp_of(logits_TV[place])[one.token_ids[place]]
    assert one.logprobs[place] == pytest.approx(logp, abs=1e-4)
  assert spelled.seen[-1] == one.token_ids[:7]
  assert other.token_ids == alone.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("changes", [MANY, dict(max_tokens=9)])
def test_no_draft_where_a_token_changes_the_next_distribution(
  model, engine, changes
):
  drafting = engine_lib.Engine(
    model, engine_lib.EngineConfig(**SIZES, speculate=True)
  )
  spelled = None if changes is MANY else (40, 0, 17)
  (want,), (got,) = (
    one.generate([ask(spelled and Spelled(*spelled), **changes)])
    for one in (engine, drafting)
  )
  assert got.token_ids == want.token_ids
  assert got.num_drafted == 0


def test_what_is_refused(model, engine):
  (done,) = engine.generate([ask(max_tokens=3, logit_bias={1: 1.0})])
  with pytest.raises(ValueError, match="no learner can replay"):
    trajectory.from_completion(done)
  (done,) = engine.generate([ask(max_tokens=3, logit_bias={1: 0.0})])
  assert trajectory.from_completion(done).parts[0].token_ids_N.shape == (12,)
  with pytest.raises(ValueError, match="logit_bias: token=61 is outside"):
    engine.submit(ask(max_tokens=3, logit_bias={61: 1.0}))
  few = engine_lib.Engine(
    model, engine_lib.EngineConfig(**SIZES, most_adjusted=9)
  )
  with pytest.raises(ValueError, match="may change more logits"):
    few.submit(ask(max_tokens=8, presence_penalty=1, logit_bias={1: 1, 2: 1}))
  assert few.submit(ask(max_tokens=9, presence_penalty=1))
