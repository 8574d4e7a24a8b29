"""A conversation sampled by the engine: a learner finds what was drawn."""

import asyncio
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import policy as policies
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from tests.support import models

# B batch, T tokens, V vocabulary

WIDTH = 64


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["hi there"] * 5, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
  return models.tiny_model(
    num_layers=2, num_mtp_layers=0, vocab_size=tokenizer.vocab_size
  )


@pytest.fixture(scope="module")
def policy(model, tokenizer):
  engine = engine_lib.Engine(
    model,
    engine_lib.EngineConfig(
      max_batch=2, page_size=4, num_pages=40, prefill_chunk=8, max_length=WIDTH
    ),
    eos_id=tokenizer.eos_id,
  )
  seeds = itertools.count()

  async def sample(prompt_ids, max_tokens):
    sampling = requests.SamplingParameters(
      max_tokens=max_tokens, seed=next(seeds)
    )
    (completion,) = engine.generate(
      [requests.Request(prompt_ids=prompt_ids, sampling=sampling)]
    )
    return completion

  return policies.TokenPolicy(tokenizer, sample)


@pytest.mark.parametrize("mode, num_parts", [("chat", 1), ("thinking", 2)])
def test_parts_hold_what_the_engine_saw_and_drew(
  model, policy, mode, num_parts
):
  conversation = conversations.Conversation(policy.tokenizer, mode)
  for text in ("hi", "hi there"):
    conversation.add({"role": "user", "content": text})
    completion = asyncio.run(policy.complete(conversation, max_tokens=6))
    completion.add_to(conversation)
  parts = conversation.parts()
  assert len(parts) == num_parts
  drawn = sum(sum(part.written) for part in parts)
  records = [record for part in parts for record in part.records]
  assert drawn == sum(len(record.token_ids) for record in records) > 6
  forward = jax.jit(lambda model, tokens_BT: model(tokens_BT).logits)
  for part in parts:
    count = len(part.token_ids)
    tokens_BT = jnp.array([[*part.token_ids, *[0] * (WIDTH - count)]])
    logp_BTV = jax.nn.log_softmax(forward(model, tokens_BT))
    # Position t predicts token t + 1; what follows a token cannot reach it.
    found = [
      float(logp_BTV[0, place - 1, token])
      for place, token in enumerate(part.token_ids)
      if part.written[place]
    ]
    given = [x for x, w in zip(part.logprobs, part.written) if w]
    np.testing.assert_allclose(found, given, atol=1e-4, rtol=0)
