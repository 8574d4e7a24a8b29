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
)


def oracle(logits_V, one):
  """Ids that stay, and log-probabilities of all tokens, in float64."""
  logits_V = np.float64(logits_V)
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
  ],
)
def test_bad_parameters(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    requests.SamplingParameters(**dict(max_tokens=4) | changes)
