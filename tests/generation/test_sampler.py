"""The sampler against float64 numpy, and its draws against what it says."""

import functools

import jax
import numpy as np
import pytest

from dsv32_jax.generation import requests
from dsv32_jax.generation import sampler

# B rows, V vocabulary

VOCABULARY = 50
CASES = (
  dict(),
  dict(temperature=0.0),
  dict(temperature=0.5),
  dict(top_k=1),
  dict(top_k=7),
  dict(top_k=VOCABULARY + 9),
  dict(top_p=0.6),
  dict(top_p=1e-6),
  dict(min_p=0.2),
  dict(min_p=1.0),
  dict(temperature=1.7, top_k=20, top_p=0.7, min_p=0.05),
  dict(top_p=0.9, banned_ids=(3, 31, 32, 49)),
  dict(temperature=0.0, banned_ids=tuple(range(40))),
  dict(top_logprobs=20),
  dict(top_k=7, top_logprobs=20),
  dict(logit_bias={0: 3.5, 31: -8.0, 49: 6.0}),
  dict(temperature=0.7, top_p=0.9, logit_bias={n: n / 9 for n in range(50)}),
  dict(temperature=0.0, logit_bias={12: 30.0}, banned_ids=(5,)),
)


def oracle(logits_V, one):
  """Ids that stay, and log-probabilities of all tokens, in float64."""
  logits_V = np.float64(logits_V)
  for token, bias in one.logit_bias:
    logits_V[token] += bias
  logits_V[list(one.banned_ids)] = -np.inf
  order = np.argsort(-logits_V, kind="stable")
  order = order[np.isfinite(logits_V[order])]
  if one.temperature == 0:
    order = order[:1]
  else:
    logits_V = logits_V / one.temperature
    if one.top_k:
      order = order[: one.top_k]
    chance = np.exp(logits_V[order] - logits_V[order[0]])
    chance /= chance.sum()
    before = np.concatenate([[0.0], np.cumsum(chance)[:-1]])
    inside = (before < one.top_p) & (chance >= one.min_p * chance[0])
    order = order[inside]
  logp_V = np.full(logits_V.shape, -np.inf)
  total = np.log(np.exp(logits_V[order] - logits_V[order[0]]).sum())
  logp_V[order] = logits_V[order] - logits_V[order[0]] - total
  return np.sort(order), logp_V


@functools.cache
def drawn():
  """One call with a row for each case, and the logits."""
  generator = np.random.default_rng(0)
  shape = (len(CASES), VOCABULARY)
  logits_BV = generator.normal(0, 2, shape).astype(np.float32)
  cases = [requests.SamplingParameters(max_tokens=1, **c) for c in CASES]
  rows = sampler.rows(cases, range(len(cases)), [0] * len(cases), VOCABULARY)
  biases = sampler.biases([dict(c.logit_bias) for c in cases], VOCABULARY)
  rows = rows._replace(bias_id_BK=biases[0], bias_BK=biases[1])
  return (
    logits_BV,
    cases,
    jax.device_get(jax.jit(sampler.draw)(logits_BV, rows)),
  )


@pytest.mark.parametrize("row", range(len(CASES)))
def test_kept_set_and_logprob(row):
  logits_BV, cases, got = drawn()
  ids, logp_V = oracle(logits_BV[row], cases[row])
  kept = sampler.kept_ids(got.kept_BW[row], VOCABULARY)
  np.testing.assert_array_equal(kept, ids)
  token = got.token_B[row]
  assert token in ids
  np.testing.assert_allclose(got.logprob_B[row], logp_V[token], atol=1e-5)
  if not cases[row].truncates:
    assert len(ids) == VOCABULARY


@pytest.mark.parametrize("row", range(len(CASES)))
def test_the_likeliest_tokens_of_what_is_drawn_from(row):
  logits_BV, cases, got = drawn()
  _, logp_V = oracle(logits_BV[row], cases[row])
  order = np.argsort(-logp_V, kind="stable")[:20]
  values_U = got.top_logprob_BU[row]
  possible_U = np.isfinite(values_U)
  np.testing.assert_array_equal(possible_U, np.isfinite(logp_V[order]))
  ids_U = got.top_id_BU[row][possible_U]
  np.testing.assert_array_equal(ids_U, order[possible_U])
  np.testing.assert_allclose(values_U[possible_U], logp_V[ids_U], atol=1e-5)


def test_a_constraint_wins_over_bans_where_nothing_else_is_left():
  one = requests.SamplingParameters(max_tokens=1, banned_ids=(1, 2, 40))
  allowed = [np.uint32([0b1110, 0]), np.uint32([0b110]), None]
  rows = sampler.rows([one] * 3, [0] * 3, [0] * 3, VOCABULARY, allowed)
  logits_BV = np.zeros((3, VOCABULARY), np.float32)
  kept_BW = sampler.draw(logits_BV, rows).kept_BW
  kept = [sampler.kept_ids(bits, VOCABULARY).tolist() for bits in kept_BW]
  everything = [n for n in range(VOCABULARY) if n not in (1, 2, 40)]
  assert kept == [[3], [1, 2], everything]


def test_draws_follow_what_is_left():
  generator = np.random.default_rng(1)
  logits_V = generator.normal(0, 1, VOCABULARY).astype(np.float32)
  one = requests.SamplingParameters(max_tokens=1, temperature=0.8, top_k=6)
  count = 4096
  rows = sampler.rows([one] * count, [5] * count, range(count), VOCABULARY)
  logits_BV = np.broadcast_to(logits_V, (count, VOCABULARY))
  got = jax.jit(sampler.draw)(logits_BV, rows)
  ids, logp_V = oracle(logits_V, one)
  seen = np.bincount(np.asarray(got.token_B), minlength=VOCABULARY)
  assert set(np.flatnonzero(seen)) <= set(ids)
  expected = count * np.exp(logp_V[ids])
  # The 99.9% point of chi-squared with five degrees of freedom.
  assert (((seen[ids] - expected) ** 2) / expected).sum() < 20.5


def test_ties_go_to_the_lower_number():
  logits_BV = np.zeros((2, VOCABULARY), np.float32)
  cases = [
    requests.SamplingParameters(max_tokens=1, top_k=3),
    requests.SamplingParameters(max_tokens=1, temperature=0),
  ]
  got = sampler.draw(logits_BV, sampler.rows(cases, [0, 0], [0, 0], VOCABULARY))
  kept = [sampler.kept_ids(bits, VOCABULARY).tolist() for bits in got.kept_BW]
  assert kept == [[0, 1, 2], [0]]


def test_seeds_and_steps_decide_the_draw():
  one = requests.SamplingParameters(max_tokens=1)
  logits_BV = np.zeros((5, VOCABULARY), np.float32)
  # Seeds that differ in the upper half alone are different.
  seeds, steps = [1, 1, 1, 1 + (1 << 40), 2], [0, 0, 1, 0, 0]
  rows = sampler.rows([one] * 5, seeds, steps, VOCABULARY)
  token_B = np.asarray(sampler.draw(logits_BV, rows).token_B).tolist()
  assert token_B[0] == token_B[1]
  assert len(set(token_B)) == 4


@pytest.mark.parametrize(
  "changes",
  [
    dict(temperature=-1.0),
    dict(temperature=float("nan")),
    dict(temperature="hot"),
    dict(top_p=0.0),
    dict(top_p=1.5),
    dict(top_k=-1),
    dict(top_k=1.5),
    dict(min_p=-0.1),
    dict(max_tokens=0),
    dict(max_tokens=True),
    dict(stop="text"),
    dict(stop=("",)),
    dict(seed=-1),
    dict(seed=1 << 63),
    dict(banned_ids=(-1,)),
    dict(presence_penalty=2.1),
    dict(presence_penalty=float("nan")),
    dict(frequency_penalty=-2.1),
    dict(frequency_penalty="high"),
    dict(logit_bias={-1: 1.0}),
    dict(logit_bias={1: float("inf")}),
    dict(logit_bias={1: -101}),
    dict(top_logprobs=21),
    dict(top_logprobs=-1),
  ],
)
def test_bad_parameters(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    requests.SamplingParameters(**dict(max_tokens=4) | changes)
