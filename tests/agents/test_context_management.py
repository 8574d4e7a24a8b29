"""Context management over searches that outgrow their window."""

import asyncio
import json

import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.agents import context
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import protocol
from dsv32_jax.data import tokenizer as tokenizers

SEARCH = protocol.ToolSchema(
  name="search",
  description="Searches.",
  parameters={
    "type": "object",
    "properties": {"query": {"type": "string"}},
    "required": ["query"],
  },
)
QUESTION = {"role": "user", "content": "Who was it?"}
SUMMARY = {
  "role": "assistant",
  "content": "Not Ann.",
  "reasoning_content": "I sum up",
}


@pytest.fixture(scope="module")
def tokenizer():
  texts = ["Who was it? <result>found</result> invoke name search"] * 20
  return tokenizers.train(texts, 320)


def search(number):
  arguments = json.dumps({"query": f"q{number}"})
  return policies.call("search", arguments, reasoning=f"r{number}")


def searched(tokenizer, num_rounds):
  made = conversations.Conversation(tokenizer, "thinking")
  made.add({"role": "system", "content": "s"})
  made.add(QUESTION)
  for number in range(num_rounds):
    made.add(search(number), written=True)
    made.add({"role": "tool", "content": f"found {number}"})
  return made


def manage(strategy, made, policy=None, num_tokens=81, window=100):
  return asyncio.run(
    strategy(made, policy, num_tokens=num_tokens, window=window)
  )


def rounds_left(made):
  return [
    message["content"].removeprefix("found ")
    for message in made.messages
    if message["role"] == "tool"
  ]


@pytest.mark.parametrize(
  "strategy, num_rounds, left",
  [
    (context.DISCARD_75, 8, "67"),
    (context.DISCARD_75, 7, "56"),
    (context.DISCARD_75, 1, ""),
    (context.DISCARD_ALL, 8, ""),
    (context.Discard(fraction=0.5), 3, "12"),
  ],
)
def test_the_oldest_rounds_go(tokenizer, strategy, num_rounds, left):
  made = searched(tokenizer, num_rounds)
  (before,) = made.parts()
  assert manage(strategy, made)
  assert "".join(rounds_left(made)) == left
  messages = made.messages
  assert messages[:2] == [{"role": "system", "content": "s"}, QUESTION]
  # What stays has its thinking: no new user message came.
  assert all("r" in x["reasoning_content"] for x in messages[2::2])
  assert tokenizer.decode(made.prompt_ids()) == (
    chat.encode_messages(messages, "thinking")
  )
  # What went is an earlier part, and what stayed is context now.
  assert made.parts() == [before]


def test_answers_of_earlier_turns_stay(tokenizer):
  made = searched(tokenizer, 1)
  made.add({"role": "assistant", "content": "Ann.", "reasoning_content": "x"})
  made.add({"role": "user", "content": "Sure?"})
  made.add(search(1))
  made.add({"role": "tool", "content": "found 1"})
  assert manage(context.DISCARD_ALL, made)
  assert [x["content"] for x in made.messages] == [
    "s",
    "Who was it?",
    "Ann.",
    "Sure?",
  ]


@pytest.mark.parametrize(
  "strategy", [context.DISCARD_75, context.DISCARD_ALL, context.Summary()]
)
def test_nothing_happens_up_to_four_fifths_or_without_history(
  tokenizer, strategy
):
  made = searched(tokenizer, 2)
  before = made.prompt_ids()
  assert not manage(strategy, made, num_tokens=80)
  assert made.prompt_ids() == before
  assert not manage(strategy, searched(tokenizer, 0))


def test_a_summary_takes_the_place_of_the_history(tokenizer):
  made, seen = searched(tokenizer, 3), []

  def script(messages):
    seen.append(messages)
    return SUMMARY

  policy = policies.ScriptedPolicy(script, tokenizer)
  window = made.num_tokens + 2000
  full = {"num_tokens": window, "window": window}
  assert manage(context.Summary(), made, policy, **full)
  assert seen[0][-1]["role"] == "user" and "summary" in seen[0][-1]["content"]
  assert len(seen[0]) == 9
  system, task = made.messages
  assert system == {"role": "system", "content": "s"}
  assert task["content"].startswith("Who was it?\n\n# Summary of the work")
  assert task["content"].endswith("\n\nNot Ann.")
  # The search and the summary are parts to train on, the request is context
  # of the latter; thinking of the search is not.
  search_part, summary_part = made.parts()
  text = tokenizer.decode(summary_part.token_ids)
  assert text.removesuffix(chat_format.EOS).endswith("sum up</think>Not Ann.")
  assert "r0</think>" not in text
  assert "r0</think>" in tokenizer.decode(search_part.token_ids)
  # A second summary replaces the first.
  made.add(search(9))
  made.add({"role": "tool", "content": "found 9"})
  again = {**SUMMARY, "content": "Nor Bob."}
  policy = policies.ScriptedPolicy(policies.replies(again, again), tokenizer)
  assert manage(context.Summary(), made, policy, **full)
  assert "Not Ann." in tokenizer.decode(made.parts()[-1].token_ids)
  text = made.messages[-1]["content"]
  assert text.count("# Summary") == 1 and text.endswith("Nor Bob.")
  assert "Not Ann." not in text


@pytest.mark.parametrize(
  "reply",
  [
    "never ends",
    search(5),
    {**SUMMARY, "content": "  "},
  ],
)
def test_without_a_usable_summary_all_is_discarded(tokenizer, reply):
  made = searched(tokenizer, 2)
  policy = policies.ScriptedPolicy(lambda messages: reply, tokenizer)
  window = made.num_tokens + 2000
  assert manage(
    context.Summary(), made, policy, num_tokens=window, window=window
  )
  assert made.messages == [{"role": "system", "content": "s"}, QUESTION]


def test_no_room_for_a_summary(tokenizer):
  made = searched(tokenizer, 2)
  policy = policies.ScriptedPolicy(policies.replies(), tokenizer)
  assert manage(context.Summary(), made, policy, num_tokens=90, window=100)
  assert made.messages[-1] == QUESTION


class Endless:
  """Finds something every time, the answer only in the end."""

  def __init__(self, num_searches):
    self.left = num_searches

  async def reset(self):
    return protocol.Start(observation="Who was it?", tools=[SEARCH])

  async def step(self, call):
    self.left -= 1
    return protocol.Step(observation="found " * 20, done=self.left == 0)

  async def verify(self):
    return float(self.left == 0)

  async def close(self):
    pass


def episode(tokenizer, strategy, num_searches=24, **limits):
  def script(messages):
    if "summary" in str(messages[-1]["content"]).rsplit("#", 1)[0]:
      return SUMMARY
    return search(len(messages))

  return asyncio.run(
    loop.run_episode(
      policies.ScriptedPolicy(script, tokenizer),
      lambda: Endless(num_searches),
      episode_id="e",
      limits=loop.EpisodeLimits(**{"window": 3000, **limits}),
      manage_context=strategy,
    )
  )


def test_a_search_beyond_the_window_needs_management(tokenizer):
  plain = episode(tokenizer, None).result
  assert (plain.finish, plain.reward) == ("max_tokens", 0.0)
  for strategy in (
    context.DISCARD_75,
    context.DISCARD_ALL,
    context.Summary(),
  ):
    managed = episode(tokenizer, strategy)
    assert (managed.result.finish, managed.result.reward) == ("done", 1.0)
    assert managed.result.num_turns == 24
    assert managed.result.num_context_changes >= 2
    parts = managed.conversation.parts()
    assert len(parts) > managed.result.num_context_changes
    assert all(len(part.token_ids) <= 3000 for part in parts)
    # Every reply is written in exactly one part.
    written = [
      sum(a and not b for a, b in zip(part.written, (False, *part.written)))
      for part in parts
    ]
    summaries = isinstance(strategy, context.Summary)
    changes = managed.result.num_context_changes * summaries
    assert sum(written) == 24 + changes


def test_changes_are_bounded(tokenizer):
  bounded = episode(tokenizer, context.DISCARD_ALL, 100, context_changes=2)
  assert bounded.result.finish == "max_tokens"
  assert bounded.result.num_context_changes == 2


def test_the_fewest_steps_win():
  outcomes = [
    ("max_turns", 1),
    ("answered", 5),
    ("done", 3),
    ("answered", 3),
    ("crashed", 0),
  ]

  async def run(number):
    finish, num_turns = outcomes[number]
    result = loop.EpisodeResult(
      id=str(number), finish=finish, num_turns=num_turns
    )
    return loop.Episode(
      result=result, conversation=conversations.Conversation(None, "chat")
    )

  def best(count):
    return asyncio.run(context.fewest_steps(run, count)).result.id

  assert [best(count) for count in range(1, 6)] == ["0", "1", "2", "2", "2"]
  with pytest.raises(ValueError, match="count=0"):
    best(0)


def test_bad_fractions():
  for values in ({"fraction": 0}, {"fraction": 1.5}):
    with pytest.raises(ValueError, match="fraction="):
      context.Discard(**values)
  with pytest.raises(ValueError, match="threshold=2"):
    context.Summary(threshold=2)
  with pytest.raises(ValueError, match="max_tokens=0"):
    context.Summary(max_tokens=0)
