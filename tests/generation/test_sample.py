"""Drawing tokens, and decoding through the cache."""

import jax
import numpy as np
import pytest

from dsv32_jax.evals import decode_time
from dsv32_jax.generation import sample
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from tests.support import models


def test_nucleus_keeps_the_most_likely_up_to_top_p():
  probabilities = np.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
  logits = np.log(probabilities).astype(np.float32)
  for top_p, kept in (
    (0.4, [[1], [0]]),
    (0.6, [[1, 3], [0]]),
    (0.8, [[1, 2, 3], [0]]),
    (1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
  ):
    got = np.isfinite(sample.nucleus(logits, top_p))
    assert [np.flatnonzero(row).tolist() for row in got] == kept, top_p


def test_draws_follow_the_probabilities():
  probabilities = np.array([0.1, 0.5, 0.15, 0.25])
  logits = np.log(probabilities)[None].astype(np.float32)
  config = sample.SamplingConfig(temperature=0.5)
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.vmap(lambda key: sample.draw(logits, key, config))(keys)
  sharper = probabilities**2 / (probabilities**2).sum()
  share = np.bincount(np.asarray(drawn)[:, 0], minlength=4) / 4000
  np.testing.assert_allclose(share, sharper, atol=0.03)
  greedy = sample.SamplingConfig(temperature=0)
  assert sample.draw(logits, keys[0], greedy).tolist() == [1]


@pytest.mark.parametrize("changes", [dict(temperature=-1), dict(top_p=0.0)])
def test_bad_sampling(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    sample.SamplingConfig(**changes)


@pytest.fixture(scope="module")
def model():
  # One layer: an unstacked layer is compiled for each.
  return models.tiny_model(num_layers=1, num_dense_layers=0, num_mtp_layers=0)


@pytest.mark.parametrize("select", [selection.DENSE, selection.TopK(6)])
def test_greedy_decoding_equals_whole_forwards(model, select):
  options = attention.AttentionOptions(select=select)
  decoder = sample.Decoder(model, options)
  prompt = np.asarray(models.random_tokens((1, 11)))[0].tolist()
  greedy = sample.SamplingConfig(temperature=0)
  got = sample.generate(decoder, prompt, num_tokens=5, sampling=greedy)
  sequence = np.zeros((1, 16), np.int32)
  sequence[0, :11] = prompt
  forward = jax.jit(lambda tokens: model(tokens, options=options).logits)
  for place in range(11, 16):
    # Later tokens are not seen.
    logits = forward(sequence)
    sequence[0, place] = int(np.argmax(logits[0, place - 1]))
  assert got == sequence[0, 11:].tolist()
  eos = got[1]
  stopped = sample.generate(
    decoder, prompt, num_tokens=5, sampling=greedy, eos_id=eos, capacity=16
  )
  assert stopped == got[: got.index(eos) + 1]


def test_prompts_that_do_not_fit(model):
  decoder = sample.Decoder(model, model.default_options())
  sampling = sample.SamplingConfig()
  with pytest.raises(ValueError, match="must be positive"):
    sample.generate(decoder, [], num_tokens=3, sampling=sampling)
  with pytest.raises(ValueError, match="exceed the cache's capacity=4"):
    sample.generate(
      decoder, [1, 2], num_tokens=3, sampling=sampling, capacity=4
    )


def test_time_per_token(model):
  decoder = sample.Decoder(model, model.default_options())
  seconds = decode_time.time_per_token(decoder, [16], num_tokens=2)
  assert len(seconds) == 1 and all(0 < value < 60 for value in seconds)
  with pytest.raises(ValueError, match="position=4 must exceed"):
    decode_time.time_per_token(decoder, [4], num_tokens=2)
