"""Episodes of several turns: what the engine drew is what is trained on."""

import asyncio
import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.agents import context
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import policy as policies
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import local_policy
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import runner as runners
from dsv32_jax.rl import config as rl_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import learner
from dsv32_jax.rl import microbatches
from dsv32_jax.rl import rollout
from dsv32_jax.rl import trajectory
from tests.support import models
from tests.support import tolerances

# B batch, T tokens

CONFIG = rl_config.LearnerConfig(
  grpo=grpo.GrpoConfig(
    clip_low=0.2, clip_high=0.2, kl_weight=0.0, off_policy_threshold=0.1
  ),
  temperature=0.8,
  replay_selection=True,
)
LENGTH = 319


@pytest.fixture(scope="module")
def tokenizer():
  # The request for a summary must leave room for one.
  source = pathlib.Path(context.__file__).read_text(encoding="utf-8")
  return tokenizers.train(["hi there, what is it?", source] * 9, 700)


@pytest.fixture(scope="module")
def model(tokenizer):
  return models.tiny_model(
    num_layers=2, num_mtp_layers=0, vocab_size=tokenizer.vocab_size + 5
  )


class Turns:
  """A conversation with an engine, and everything that the engine drew."""

  def __init__(self, runner, tokenizer, mode, seed):
    banned = range(tokenizer.vocab_size, tokenizer.vocab_size + 5)
    sampling = requests.SamplingParameters(
      max_tokens=7,
      temperature=0.8,
      top_p=0.9,
      seed=seed,
      banned_ids=tuple(banned),
    )
    self.policy = local_policy.local_policy(
      runner, tokenizer, sampling, want_routing=True, want_selection=True
    )
    self.conversation = conversations.Conversation(tokenizer, mode)
    self.drawn: list[policies.Completion] = []

  async def complete(self, conversation, *, max_tokens):
    found = await self.policy.complete(conversation, max_tokens=max_tokens)
    self.drawn.append(found)
    return found

  @property
  def tokenizer(self):
    return self.policy.tokenizer

  async def play(self, rewrite):
    """Three replies, each answered by a result; then maybe another context."""
    self.conversation.add({"role": "user", "content": "what is it?"})
    for _ in range(3):
      completion = await self.complete(self.conversation, max_tokens=7)
      message = completion.add_to(self.conversation)
      if "malformed" not in message:
        break
      self.conversation.add({"role": "tool", "content": "hi"})
    await rewrite(self)
    return self


async def nothing(turns):
  del turns


async def ask_again(turns):
  turns.conversation.add({"role": "user", "content": "what?"})
  completion = await turns.complete(turns.conversation, max_tokens=5)
  completion.add_to(turns.conversation)


async def manage(turns, manager):
  changed = await manager(
    turns.conversation, turns, num_tokens=LENGTH, window=LENGTH
  )
  assert changed
  completion = await turns.complete(turns.conversation, max_tokens=5)
  completion.add_to(turns.conversation)


async def discard(turns):
  await manage(turns, context.DISCARD_ALL)


async def summarise(turns):
  await manage(turns, context.Summary(max_tokens=5))


PLAYS = [
  ("thinking", nothing, 1),
  ("thinking", ask_again, 2),
  ("chat", ask_again, 1),
  ("thinking", discard, 2),
  # The request for it drops the thinking, and it replaces what came before.
  ("thinking", summarise, 3),
  ("chat", nothing, 1),
]


@pytest.fixture(scope="module")
def played(model, tokenizer):
  engine = engine_lib.Engine(
    model,
    engine_lib.EngineConfig(
      max_batch=4,
      page_size=8,
      num_pages=250,
      prefill_chunk=16,
      max_length=LENGTH + 1,
    ),
    eos_id=tokenizer.eos_id,
  )
  runner = runners.Runner(engine, max_requests=len(PLAYS))

  async def all_of_them():
    return await asyncio.gather(
      *(
        Turns(runner, tokenizer, mode, seed).play(rewrite)
        for seed, (mode, rewrite, _) in enumerate(PLAYS)
      )
    )

  found = asyncio.run(all_of_them())
  assert runner.drain(60)
  return found


@pytest.fixture(scope="module")
def trajectories(played):
  return [
    trajectory.from_parts(one.conversation.parts(), domain="chat")
    for one in played
  ]


def batches(trajectories, config, **kwargs):
  return rollout.minibatches(
    [trajectories[:3], trajectories[3:]],
    [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]],
    CONFIG,
    config,
    lengths=(LENGTH,),
    seed=0,
    **kwargs,
  )


def test_a_rewritten_context_splits(trajectories):
  assert [len(one.parts) for one in trajectories] == [n for *_, n in PLAYS]
  written = [part.written_N for one in trajectories for part in one.parts]
  # Several turns in a part: given, drawn, given, drawn.
  assert max(np.sum(np.diff(x.astype(int)) == 1) for x in written) > 1


def test_what_is_trained_is_what_was_drawn(played, trajectories):
  for turns, found in zip(played, trajectories, strict=True):
    drawn = [
      (token, logprob)
      for completion in turns.drawn
      for token, logprob in zip(completion.token_ids, completion.logprobs)
    ]
    trained = [
      (int(part.token_ids_N[place]), float(part.logp_N[place]))
      for part in found.parts
      for place in np.flatnonzero(part.written_N)
    ]
    assert trained == drawn
    # And behind exactly the tokens that the sampler saw.
    ends = [
      (
        part.token_ids_N[: 1 + place].tolist()
        if place + 1 == len(part.written_N) or not part.written_N[place + 1]
        else None
      )
      for part in found.parts
      for place in np.flatnonzero(part.written_N)
    ]
    seen = [
      [*one.record.prompt_ids, *one.record.token_ids] for one in turns.drawn
    ]
    assert [end for end in ends if end] == seen


def test_a_batch_shares_advantage_and_number(model, trajectories):
  (batch,) = batches(trajectories, model.config, num_rows=6)
  # Ten parts, so twice the six rows.
  assert batch.advantages_B.shape == (12,) and batch.num_sequences == 6
  counts = np.bincount(batch.trajectory_B[batch.trajectory_B >= 0])
  assert sorted(counts) == [1, 1, 1, 2, 2, 3]
  for number in range(6):
    assert len(set(batch.advantages_B[batch.trajectory_B == number])) == 1
  assert np.all(batch.batch.loss_mask_BT[batch.trajectory_B < 0] == 0)


def test_parts_stay_in_one_microbatch(model, trajectories):
  (batch,) = batches(trajectories, model.config, num_rows=6, pieces=2)
  pieces = batch.trajectory_B.reshape(4, 3)
  for number in range(6):
    assert sum(number in piece for piece in pieces) == 1
  with pytest.raises(ValueError, match="3 parts, more than the 2 rows"):
    batches(trajectories, model.config, num_rows=6, pieces=3)


def rl_gradient(model, batch):
  """The policy's loss and its gradient by what the head reads."""
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    def loss(shift_BT):
      found = learner.policy_forward(
        nnx.merge(graph, state), batch, CONFIG, routing=True
      )
      return grpo.grpo_loss(
        found[1] + shift_BT,
        batch.old_logp_BT,
        batch.old_logp_BT,
        batch.advantages_B,
        batch.batch.loss_mask_BT,
        CONFIG.grpo,
        num_sequences=batch.num_sequences,
        trajectory_B=batch.trajectory_B,
      )[0]

    return jax.value_and_grad(loss)(jnp.zeros(batch.old_logp_BT.shape))

  return run(state, batch)


def test_each_written_token_weighs_one_of_its_trajectory(model, trajectories):
  """On policy equation 5's gradient by a token is -A / |o| / G."""
  (batch,) = batches(trajectories, model.config)
  _, gradient_BT = rl_gradient(model, batch)
  want_BT = np.zeros(gradient_BT.shape)
  for number in range(6):
    mine = batch.trajectory_B == number
    mask = batch.batch.loss_mask_BT[mine].astype(np.float64)
    advantage = batch.advantages_B[mine][0]
    want_BT[mine] = -advantage * mask / mask.sum() / 6
  # As far as ratios are 1.
  np.testing.assert_allclose(gradient_BT, want_BT, rtol=1e-4, atol=0)


def test_ratios_of_parts_are_one(model, trajectories):
  (batch,) = batches(trajectories, model.config)
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    return learner.policy_forward(
      nnx.merge(graph, state), batch, CONFIG, routing=True
    )[1]

  gap_BT = np.abs(run(state, batch) - batch.old_logp_BT)
  gaps = gap_BT[batch.batch.loss_mask_BT > 0]
  assert gaps.max() < 1e-4 and gaps.mean() < 1e-5


def test_a_loss_is_the_same_in_pieces(model, trajectories):
  """The pieces of twelve rows in four add up to the loss of all of them."""
  (whole,) = batches(trajectories, model.config, num_rows=12)
  (cut,) = batches(trajectories, model.config, num_rows=6, pieces=2)
  pieces = microbatches.cut(jax.tree.map(jnp.asarray, cut), 4)
  losses = [
    rl_gradient(model, jax.tree.map(lambda x, n=n: x[n], pieces))[0]
    for n in range(4)
  ]
  want, _ = rl_gradient(model, whole)
  tolerances.assert_close(np.sum(losses, dtype=np.float32), want)


def test_what_no_completion_drew_is_refused(played):
  parts = played[0].conversation.parts()
  forged = dataclasses.replace(parts[0], records=parts[0].records[:-1])
  with pytest.raises(ValueError, match="no completion drew"):
    trajectory.from_parts([forged])
  first = parts[0].records[0]
  other = dataclasses.replace(first, token_ids=(3,) * len(first.token_ids))
  forged = dataclasses.replace(parts[0], records=(other, *parts[0].records[1:]))
  with pytest.raises(ValueError, match="not what the part holds"):
    trajectory.from_parts([forged])
