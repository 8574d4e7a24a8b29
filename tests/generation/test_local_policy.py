"""Episodes that share one engine against the same ones, one after another."""

import asyncio

import pytest

from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import loop
from dsv32_jax.agents.environments import protocol
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import engine as engines
from dsv32_jax.generation import local_policy
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import runner as runners
from tests.support import models

NUM_EPISODES = 32


class Question:
  """A question without tools; malformed replies are told and tried again."""

  def __init__(self, text):
    self._text = text

  async def reset(self):
    return protocol.Start(observation=self._text, tools=[])

  async def verify(self):
    return 1.0

  async def close(self):
    pass


@pytest.fixture(scope="module")
def tokenizer():
  told = "error: completion: the thinking does not end <function_results>"
  return tokenizers.train([told, "hi there, what is it?"] * 9, 330)


@pytest.fixture(scope="module")
def model(tokenizer):
  return models.tiny_model(
    num_layers=2, num_mtp_layers=0, vocab_size=tokenizer.vocab_size
  )


@pytest.fixture
def engine(model, tokenizer):
  return engines.Engine(
    model,
    engines.EngineConfig(
      max_batch=8,
      page_size=8,
      num_pages=400,
      prefill_chunk=16,
      max_length=400,
      page_counts=(50,),
    ),
    eos_id=tokenizer.eos_id,
  )


def sampling(tokenizer, seed):
  """Few tokens, so that replies end, some with thinking and some without."""
  kept = [tokenizer.eos_id, tokenizer.special_id("think_end")]
  kept += [tokenizer.encode(text)[0] for text in "abcdef"]
  return requests.SamplingParameters(
    max_tokens=60,
    seed=seed,
    banned_ids=set(range(tokenizer.vocab_size)) - set(kept),
  )


async def episode(runner, tokenizer, number):
  policy = local_policy.local_policy(
    runner, tokenizer, sampling(tokenizer, number), want_routing=True
  )
  question = "what is it? " * (1 + number % 4)
  return await loop.run_episode(
    policy,
    lambda: Question(question),
    episode_id=str(number),
    limits=loop.EpisodeLimits(turns=4, window=390, turn_tokens=40),
  )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_episodes_at_once_go_as_they_go_alone(engine, tokenizer):
  runner = runners.Runner(engine, max_requests=NUM_EPISODES)

  async def at_once():
    return await asyncio.gather(
      *(episode(runner, tokenizer, number) for number in range(NUM_EPISODES))
    )

  async def one_by_one():
    return [
      await episode(runner, tokenizer, number) for number in range(NUM_EPISODES)
    ]

  alone = asyncio.run(one_by_one())
  together = asyncio.run(at_once())
  stats = runner.stats()
  assert stats["pages_used"] == stats["running"] == stats["waiting"] == 0
  assert runner.drain(60)
  for one, other in zip(alone, together):
    rows = one.result.row(), other.result.row()
    assert rows[0] | {"seconds": 0} == rows[1] | {"seconds": 0}
    parts = one.conversation.parts(), other.conversation.parts()
    for mine, theirs in zip(*parts, strict=True):
      assert mine.token_ids == theirs.token_ids
      assert mine.written == theirs.written
      assert mine.logprobs == theirs.logprobs
      for left, right in zip(mine.records, theirs.records, strict=True):
        assert left.token_ids == right.token_ids
        assert (left.experts_LNA == right.experts_LNA).all()
  # Not all of one kind: else little would have been compared.
  turns = {one.result.num_turns for one in together}
  finishes = {one.result.finish for one in together}
  assert len(turns) > 2 and {"answered"} < finishes
  assert any(one.result.num_bad_calls for one in together)


def test_a_reply_that_is_given_up_frees_its_pages(engine, tokenizer):
  runner = runners.Runner(engine, max_requests=4)
  conversation = conversations.Conversation(tokenizer, "chat")
  conversation.add({"role": "user", "content": "hi"})
  endless = requests.SamplingParameters(max_tokens=398, ignore_eos=True)
  policy = local_policy.local_policy(runner, tokenizer, endless)

  async def give_up():
    task = asyncio.ensure_future(policy.complete(conversation, max_tokens=380))
    while not runner.stats()["pages_used"]:
      await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    with pytest.raises(ValueError, match="max_length=400"):
      await policy.complete(conversation, max_tokens=10**6)

  asyncio.run(give_up())
  assert runner.drain(60)
  assert runner.stats()["pages_used"] == 0
