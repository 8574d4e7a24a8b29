"""Solved problems as examples: what the sampler sees, and what it is to say."""

import json

import pytest

from dsv32_jax.agents import chat_format
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import limits
from dsv32_jax.data import pieces
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.rl import demonstrations
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import sampling
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks

MIXTURE = tasks.Mixture(
  [
    tasks.TaskConfig(kind=kind, size=size)
    for kind, size in (
      ("arithmetic", 2),
      ("sorting", 3),
      ("brackets", 4),
      ("knights", 2),
      ("programs", 2),
      ("instructions", 3),
    )
  ],
  split="train",
  seed=0,
)


@pytest.mark.parametrize("thinking", [False, True])
def test_episodes_fit_into_small_windows(thinking):
  """Few tokens a call, since the format's own texts are single ones."""
  config = episode_config.EpisodesConfig(
    environments=tuple(
      episode_config.EnvironmentConfig(
        kind=kind, size=2, largest=9, thinking=thinking
      )
      for kind in ("calculator", "repairs", "searches")
    ),
    limits=limits.EpisodeLimits(turns=5, window=256),
    tool_descriptions="signatures",
  )
  texts = list(demonstrations.texts(config, seed=0, count=150))
  tokenizer = tokenizers.train(texts, 768, chat_format.PHRASES)
  # One that begins another is seen as often, and need not be a token.
  alone = [
    phrase
    for phrase in chat_format.PHRASES
    if sum(x.startswith(phrase) for x in chat_format.PHRASES) == 1
    and sum(phrase in text for text in texts) > 20
  ]
  assert len(alone) > 8
  assert all(len(tokenizer.encode(phrase)) == 1 for phrase in alone)
  drawn = environments.Tasks(config.environments, split="train", seed=0)
  played = [drawn.task(number) for number in range(60)]
  for result, mode in demonstrations.solved(config, played):
    conversation = conversations.Conversation(tokenizer, mode)
    for message in result.messages:
      conversation.add(message)
    assert conversation.num_tokens <= 256, result.id


@pytest.mark.parametrize("thinking", [False, True])
def test_solved_problems_begin_as_the_prompt_and_earn_the_reward(thinking):
  problems = [MIXTURE.problem(number) for number in range(40)]
  assert len({one.task for one in problems}) == 6
  tokenizer = tokenizers.train([one.question for one in problems], 400)
  for problem in problems:
    given = demonstrations.problem_pieces(problem, thinking=thinking)
    learnt, prompt = [], []
    for piece, learn in pieces.read(json.dumps(given), tokenizer):
      ids = tokenizer.encode(piece) if isinstance(piece, str) else [piece]
      (learnt if learn else prompt).extend(ids)
    assert prompt == sampling.prompt_ids(
      problem.question, tokenizer, thinking=thinking
    )
    assert learnt.pop() == tokenizer.eos_id
    config = reward.RewardConfig(thinking=thinking, format_weight=1.0)
    answer = reward.Answer(
      problem=problem,
      response=tokenizer.decode(learnt),
      num_tokens=len(learnt),
    )
    assert reward.score(answer, config).value == 2.0
