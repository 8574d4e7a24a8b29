"""How often drafts are right when the MTP module has learned something."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from tests.support import models

pytestmark = pytest.mark.slow

# B batch, T tokens, V vocabulary

VOCABULARY, STEPS = 61, 150


def texts(count, length, seed):
  """Chains in which a token has two successors, one of them nine times in ten.

  Of the tokens that such a chain holds, 0.9 is the most that a greedy guess at
  the next one gets right.
  """
  successors_V2 = np.random.default_rng(0).integers(0, 61, (VOCABULARY, 2))
  generator = np.random.default_rng(seed)
  tokens_BT = generator.integers(0, VOCABULARY, (count, length))
  for place in range(1, length):
    which_B = (generator.random(count) > 0.9).astype(int)
    tokens_BT[:, place] = successors_V2[tokens_BT[:, place - 1], which_B]
  return tokens_BT.astype(np.int32)


@pytest.fixture(scope="module")
def model():
  """A tiny model and its MTP module, both trained on such chains."""
  model = models.tiny_model(num_layers=2, num_dense_layers=1)
  graph, trained, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.adam(5e-3)

  def loss_of(trained, tokens_BT):
    model = nnx.merge(graph, trained, rest)
    output = model(tokens_BT)
    further_BTD, _ = model.predict_further(output, tokens_BT)
    further_BTV = model.head(further_BTD)
    cost = optax.softmax_cross_entropy_with_integer_labels
    return jnp.mean(cost(output.logits[:, :-1], tokens_BT[:, 1:])) + jnp.mean(
      cost(further_BTV[:, :-2], tokens_BT[:, 2:])
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(trained, moments, tokens_BT):
    gradient = jax.grad(loss_of)(trained, tokens_BT)
    updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(trained, updates), moments

  moments = optimizer.init(trained)
  for number in range(STEPS):
    trained, moments = step(trained, moments, texts(16, 32, number + 1))
  return nnx.merge(graph, trained, rest)


def test_most_drafts_are_right(model):
  sizes = dict(
    max_batch=4, page_size=4, num_pages=60, prefill_chunk=8, max_length=48
  )
  prompts = texts(8, 8, 10**6).tolist()
  for temperature in (0.0, 1.0):
    asked = [
      requests.Request(
        prompt_ids=ids,
        sampling=requests.SamplingParameters(
          max_tokens=30, temperature=temperature, seed=seed
        ),
      )
      for seed, ids in enumerate(prompts)
    ]
    engines = (
      engine_lib.Engine(
        model, engine_lib.EngineConfig(**sizes, speculate=speculate)
      )
      for speculate in (False, True)
    )
    want, got = (engine.generate(asked) for engine in engines)
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    accepted = sum(one.num_accepted for one in got)
    drafted = sum(one.num_drafted for one in got)
    # By chance one in 61 would be.
    assert accepted > 0.5 * drafted, f"{temperature=} {accepted=} {drafted=}"
