"""Solved problems as examples: what the sampler sees, and what it is to say."""

import json

import pytest

from dsv32_jax.data import pieces
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.rl import demonstrations
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
