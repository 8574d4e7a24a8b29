"""A specialist's answers to its problems, each with its verdict."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import zlib

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.distillation import config as config_lib
from dsv32_jax.generation import requests
from dsv32_jax.rl import sampling as rl_sampling
from dsv32_jax.verifiers import reward as reward_lib
from dsv32_jax.verifiers import tasks

Generate = Callable[[Sequence[requests.Request]], Sequence[requests.Completion]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One answer, or one episode.

  Attributes:
    id: of specialist, task, problem and answer.
    specialist: that gave it.
    task: name of the problem's task.
    problem: what makes the problem; answers to the same one share it.
    thinking: whether it was to think first.
    num_tokens: of the answer; of an episode, those that it wrote.
    reason: why it is no example; empty if it is one.
    messages: question and answer, in the form of the OpenAI API; the question
      alone where the answer has not the chat format. Of an episode, all.
  """

  id: str
  specialist: str
  task: str
  problem: str
  thinking: bool
  num_tokens: int
  reason: str
  messages: Sequence[dict]


def problems_of(
  specialist: config_lib.SpecialistConfig, seed: int
) -> list[tasks.Problem]:
  """Different problems of the training split, each task's in turn.

  Raises:
    ValueError: if a task has not as many.
  """
  found = []
  for task in specialist.tasks:
    drawn = tasks.generate(task.make(), split="train", seed=seed)
    mine = list(itertools.islice(drawn, specialist.problems))
    if len(mine) < specialist.problems:
      raise ValueError(
        f"{specialist.name}: {task.kind} has {len(mine)} problems, not"
        f" {specialist.problems}"
      )
    found.extend(mine)
  return found


def sample(
  specialist: config_lib.SpecialistConfig,
  config: config_lib.DistillConfig,
  tokenizer: tokenizers.Tokenizer,
  generate: Generate,
  rewarder: reward_lib.Rewarder,
) -> list[Sample]:
  """Draws and judges every answer of a specialist.

  An example is whole, has the chat format of the specialist's mode, and its
  verifier accepts it. The same config gives the same answers.

  Args:
    specialist: whose engine `generate` is.
    config: of the distillation.
    tokenizer: of the specialist.
    generate: completes requests, in order.
    rewarder: scores answers; what it adds to the outcome does not count.
  """
  mode = "thinking" if specialist.thinking else "chat"
  problems = problems_of(specialist, config.seed)
  asked = [
    (problem, number, answer)
    for number, problem in enumerate(problems)
    for answer in range(config.answers)
  ]
  prompts = {one.question: _prompt(one, mode, tokenizer) for one in problems}
  completions = generate(
    [
      requests.Request(
        prompt_ids=prompts[problem.question],
        sampling=config.parameters(
          seed=seed_of(config.seed, specialist.name, number, answer)
        ),
      )
      for problem, number, answer in asked
    ]
  )
  texts = [_text(tokenizer, one.token_ids) for one in completions]
  rewards = rewarder.score(
    [
      reward_lib.Answer(
        problem=problem,
        response=text,
        num_tokens=len(completion.token_ids),
      )
      for (problem, _, _), text, completion in zip(asked, texts, completions)
    ]
  )
  return [
    _judged(specialist, mode, *one)
    for one in zip(asked, completions, texts, rewards)
  ]


def _judged(specialist, mode, asked, completion, text, reward):
  problem, number, answer = asked
  question = {"role": "user", "content": problem.question}
  messages, reason = [question], ""
  try:
    reply = chat.parse_message_from_completion_text(
      text + chat_format.EOS, mode
    )
    messages.append(_example(reply))
  except ValueError as error:
    reason = f"it has not the chat format: {error}"
  if completion.finish_reason != "stop":
    reason = "it was cut off"
  elif reward.error:
    reason = f"it was not scored: {reward.error}"
  elif reward.outcome < 1:
    reason = "it is wrong"
  elif specialist.thinking and not reason and not reply["reasoning_content"]:
    reason = "it does not think"
  return Sample(
    id=f"{specialist.name}-{number}-{answer}",
    specialist=specialist.name,
    task=problem.task,
    problem=problem.content,
    thinking=specialist.thinking,
    num_tokens=len(completion.token_ids),
    reason=reason,
    messages=messages,
  )


def _example(reply: dict) -> dict:
  """A parsed reply without what it has not."""
  return {name: value for name, value in reply.items() if value}


def _prompt(problem, mode, tokenizer) -> list[int]:
  conversation = conversations.Conversation(tokenizer, mode)
  conversation.add({"role": "user", "content": problem.question})
  return conversation.prompt_ids()


def _text(tokenizer, token_ids) -> str:
  """Text without the end and without ids that only pad the vocabulary."""
  limit = tokenizer.vocab_size
  kept = [i for i in token_ids if i < limit and i != tokenizer.eos_id]
  return tokenizer.decode(kept)


def seed_of(seed: int, name: str, *numbers: int) -> int:
  """A seed of 63 bits that follows from all of them; `name` of a specialist."""
  return rl_sampling.seed_of(seed, zlib.crc32(name.encode()), *numbers)
