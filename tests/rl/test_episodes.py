"""Rollouts of episodes: tasks, rewards, and runs that stop and go on."""

import asyncio
import dataclasses
import itertools
import json
import os
import random
import re
import signal

import numpy as np
import pytest

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import loop as agent_loop
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import calculator
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import lookups
from dsv32_jax.agents.synthesis.general import solving
from dsv32_jax.data import pieces
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.rl import demonstrations
from dsv32_jax.rl import environments
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import episodes
from dsv32_jax.rl import loop
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.training import metrics
from dsv32_jax.training import run
from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks
from tests.support import rl_runs

CALCULATOR = episode_config.EnvironmentConfig(
  kind="calculator", size=2, largest=9
)
LOOKUPS = episode_config.EnvironmentConfig(kind="lookups")
REPAIRS = episode_config.EnvironmentConfig(kind="repairs", size=2, largest=9)
SEARCHES = episode_config.EnvironmentConfig(kind="searches", size=2)
EPISODES = episode_config.EpisodesConfig(
  environments=(CALCULATOR, LOOKUPS),
  limits=agent_loop.EpisodeLimits(turns=4, window=400),
  thinking_mode="chat",
  tool_descriptions="signatures",
)


def tasks_of(config, split="train", seed=0):
  return environments.Tasks(config.environments, split=split, seed=seed)


def test_a_task_follows_from_seed_and_number():
  first, again = (tasks_of(EPISODES) for _ in range(2))
  ids = [first.task(number).id for number in range(40)]
  assert ids == [again.task(number).id for number in reversed(range(40))][::-1]
  other = tasks_of(EPISODES, seed=1)
  assert ids != [other.task(number).id for number in range(40)]
  domains = {first.task(number).domain for number in range(40)}
  assert "calculator" in domains and len(domains) > 3


def test_no_task_is_in_both_splits():
  train, held_out = (
    {x.id for x in tasks_of(EPISODES, split, seed).different(30)}
    for split, seed in (("train", 0), ("held_out", 3))
  )
  # Small sums are soon all there.
  assert len(held_out) > 30 and not train & held_out


@pytest.mark.parametrize("config", [REPAIRS, SEARCHES], ids=lambda x: x.kind)
def test_no_function_or_answer_is_in_both_splits(config):
  """Whatever the fault or the world, what has to be found is of one split."""
  contents = []
  for split, seed, count in (("train", 0, 400), ("held_out", 3, 100)):
    drawn = environments.Tasks((config,), split=split, seed=seed)
    contents.append(
      {drawn.task(number).id.partition("/")[0] for number in range(count)}
    )
  train, held_out = contents
  assert len(train) > 200 and len(held_out) > 40 and not train & held_out


def test_what_a_repair_teaches_to_write_is_of_the_split_of_its_program():
  """Files and questions say a function in the same words."""
  repair = episode_config.EnvironmentConfig(kind="repairs", size=1, largest=3)
  program = tasks.TaskConfig(kind="programs", size=2, largest=3)
  said, asked = {}, {}
  for split in ("train", "held_out"):
    drawn = environments.Tasks((repair,), split=split, seed=0)
    texts = (drawn.task(n).make().task.modules[0].text for n in range(200))
    said[split] = {text.splitlines()[0].removeprefix("# ") for text in texts}
    posed = tasks.Mixture((program,), split=split, seed=0)
    questions = (posed.problem(n).question for n in range(200))
    asked[split] = {re.search("and c: (.*?)\\. Put", x)[1] for x in questions}
  assert len(said["train"] & asked["train"]) > 10
  assert len(said["held_out"] & asked["held_out"]) > 10
  assert not said["train"] & asked["held_out"]
  assert not asked["train"] & said["held_out"]


def test_general_environments_are_held_out_whole(tmp_path):
  rng, names = random.Random(0), itertools.cycle(lookups.DOMAINS)
  records = [lookups.draw(next(names), rng) for _ in range(40)]
  path = tmp_path / "environments.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  config = episode_config.EnvironmentConfig(kind="general", path=str(tmp_path))
  train, held_out = (
    {
      one.id.partition("/")[0]
      for one in environments.Tasks((config,), split=split, seed=0).different(9)
    }
    for split in ("train", "held_out")
  )
  assert train and held_out and not train & held_out
  some = dataclasses.replace(config, domains=("no such",))
  with pytest.raises(ValueError, match="has no environment of domains"):
    environments.Tasks((some,), split="train", seed=0)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("domain", list(lookups.DOMAINS))
def test_look_ups_accept_their_solution_and_nothing_else(domain, renamed):
  rng = random.Random(domain)
  for _ in range(12):
    record = lookups.draw(domain, rng, renamed)
    (task,) = record["tasks"]
    calls = solving.solution_calls(record, task)
    environment = general.GeneralEnvironment(record, task)
    environment.start()
    for name, arguments in calls:
      assert environment.reward() == 0
      step = environment.call(name, arguments)
    assert step.done and environment.reward() == 1
    answer = json.loads(calls[-1][1]["answer_text"])["answer"]
    wrong = answer + 1 if isinstance(answer, int | float) else answer + "s"
    assert not environment.judge.accepts({"answer": wrong})
    environment.connection.close()


@pytest.mark.parametrize("domain", list(lookups.DOMAINS))
def test_renamed_look_ups_share_no_word_with_their_domain(domain):
  own = {
    word
    for table in lookups.DOMAINS[domain].tables
    for name in (table.name, *(column.name for column in table.columns))
    for word in name.split("_")
  }
  rng, names = random.Random(domain), []
  for _ in range(20):
    record = lookups.draw(domain, rng, renamed=True)
    tools = [spec["name"] for spec in record["tools"]]
    words = set("_".join(tools[:-1]).split("_"))
    words -= {"get", "count", "of", "by"}
    assert not words & own
    names.append(words)
  # Nor with one another, but for a coincidence.
  assert sum(bool(a & b) for a, b in itertools.pairwise(names)) <= 1


@pytest.mark.parametrize(
  "step, result", [("3 * -4", "-12"), (" 7+5 ", "12"), ("-1 - -1", "0")]
)
def test_a_calculator_does_one_step(step, result):
  assert calculator.result_of(step) == result


@pytest.mark.parametrize(
  "step, message",
  [
    ("1000000000000 * 2", "is beyond"),
    ("3 * 4 * 5", "must be two integers"),
    ("__import__('os')", "must be two integers"),
    ("9" * 14 + " + 1", "must be two integers"),
  ],
)
def test_a_calculator_refuses_all_else(step, message):
  with pytest.raises(tools.ToolError, match=message):
    calculator.result_of(step)


def test_a_calculators_episode_can_be_put_back():
  task = calculator.CalculatorTask(id="a", question="2 + 3?", answer=5)

  async def play():
    environment = calculator.CalculatorEnvironment(task, max_steps=3)
    await environment.reset()
    call = protocol.ToolCall(name="calculate", arguments={"step": "2 + 3"})
    assert (await environment.step(call)).observation == "5"
    saved = environment.snapshot()
    wrong = protocol.ToolCall(name="submit", arguments={"answer": 4})
    assert (await environment.step(wrong)).done
    assert await environment.verify() == 0
    await environment.restore(saved)
    right = protocol.ToolCall(name="submit", arguments={"answer": 5})
    assert (await environment.step(right)).done
    return await environment.verify()

  assert asyncio.run(play()) == 1


@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_seeds_are_the_tokens_that_a_sampler_would_see(mode):
  """The examples' tokens equal a conversation's, reply by reply."""
  config = dataclasses.replace(
    EPISODES,
    thinking_mode=mode,
    # What an environment says of itself counts.
    environments=(
      CALCULATOR,
      LOOKUPS,
      REPAIRS,
      SEARCHES,
      dataclasses.replace(CALCULATOR, name="thought", thinking=True),
    ),
  )
  texts = list(demonstrations.texts(config, seed=0, count=30))
  tokenizer = tokenizers.train(texts, 400)
  tasks = [tasks_of(config).task(number) for number in range(20)]
  modes = set()
  for task, (result, played) in zip(
    tasks, demonstrations.solved(config, tasks), strict=True
  ):
    assert played == ("thinking" if task.domain == "thought" else mode)
    modes.add(played)
    conversation = conversations.Conversation(tokenizer, played)
    for message in result.messages[:-1]:
      conversation.add(message, written=message["role"] == "assistant")
    (part,) = conversation.parts()
    given = json.dumps(cold_start.pieces(result.messages, played))
    token_ids, learnt = [], []
    for piece, learn in pieces.read(given, tokenizer):
      ids = tokenizer.encode(piece) if isinstance(piece, str) else [piece]
      token_ids += ids
      learnt += [learn] * len(ids)
    assert list(part.token_ids) == token_ids
    assert list(part.written) == learnt
    assert result.reward == 1 and result.num_bad_calls == 0
    # Tools are told by their signatures, a line each.
    system = result.messages[0]
    assert "tools" not in system
    assert ")\nsubmit" in system["content"] and "description" not in system
    for message in result.messages:
      if message["role"] == "assistant":
        thought = message.get("reasoning_content", "")
        assert thought.endswith(".") == (played == "thinking"), thought
  assert modes == {mode, "thinking"}


def episode(value, *, finish="done", tokens=10):
  result = agent_loop.EpisodeResult(
    id="a", reward=value, finish=finish, num_written_tokens=tokens
  )
  return agent_loop.Episode(result=result, conversation=None)


def test_a_crash_moves_no_advantage():
  penalty = length.LengthPenalty(free_tokens=0, max_tokens=100, weight=1.0)
  sampler = object.__new__(episodes.Sampler)
  sampler.config = small_run(reward=reward.RewardConfig(length=penalty))
  group = [episode(1.0), episode(0.0, finish="crashed"), episode(0.0, tokens=5)]
  values = [one.value for one in sampler._rewards(group)]
  np.testing.assert_allclose(values, [0.9, 0.425, -0.05])
  np.testing.assert_allclose(np.mean(values), np.mean([values[0], values[2]]))
  # Episodes may have a penalty of their own.
  own = length.LengthPenalty(free_tokens=5, max_tokens=15, weight=1.0)
  config = sampler.config
  sampler.config = dataclasses.replace(
    config, episodes=dataclasses.replace(config.episodes, length=own)
  )
  values = [one.value for one in sampler._rewards(group)]
  np.testing.assert_allclose(values, [0.5, 0.25, 0.0])
  crashed = [episode(0.0, finish="crashed")] * 2
  assert [one.value for one in sampler._rewards(crashed)] == [0.0, 0.0]


def small_run(**changes):
  defaults = dict(
    tasks=(),
    episodes=dataclasses.replace(
      EPISODES,
      environments=(CALCULATOR,),
      thinking_mode="thinking",
      limits=agent_loop.EpisodeLimits(
        turns=3, window=96, turn_tokens=12, context_changes=3
      ),
      when_full="discard_all",
    ),
    reward=reward.RewardConfig(
      length=length.LengthPenalty(free_tokens=0, max_tokens=40)
    ),
    rollouts=4,
  )
  return rl_runs.config(**(defaults | changes))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_of_episodes_that_stopped_goes_on_bitwise(
  tmp_path, monkeypatch, fresh_models_play
):
  config = small_run()
  whole = loop.train(config, str(tmp_path / "whole"))
  learn, calls = policy_lib.Policy.learn, itertools.count(1)

  def counted(self, rollout):
    if next(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return learn(self, rollout)

  monkeypatch.setattr(policy_lib.Policy, "learn", counted)
  with pytest.raises(run.Stopped, match="rollout 2 of 4"):
    loop.train(config, str(tmp_path / "parts"))
  again = loop.train(config, str(tmp_path / "parts"))
  rl_runs.assert_equal_runs(tmp_path, whole, again)
  rows = metrics.read_rows(tmp_path / "whole" / "metrics.jsonl")
  rows = [row for row in rows if row["name"] == "train"]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  # Several turns, contexts that were cut, and something to learn from them.
  assert max(row["turns"] for row in rows) > 1.5
  assert max(row["parts"] for row in rows) > 1
  assert all(row["steps"] and row["gradient_norm"] > 0 for row in rows)
  # The policy drew with the weights that learn: the first step is on policy.
  assert all(abs(row["log_old_over_new"]) < 0.05 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_episodes_side_by_side_with_learning(tmp_path, fresh_models_play):
  config = small_run(max_staleness=1, rollouts=3, evaluation=None)
  policy = loop.train(config, str(tmp_path))
  assert policy.version == 3
  rows = metrics.read_rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert all(row["staleness"] <= 1 for row in rows)


def test_pages_must_hold_an_episode(tmp_path, fresh_models_play):
  config = small_run()
  engine = dataclasses.replace(config.sampler.engine, num_pages=1)
  sampler = dataclasses.replace(config.sampler, engine=engine)
  with pytest.raises(ValueError, match=r"fewer than episodes\.limits\.window="):
    loop.train(dataclasses.replace(config, sampler=sampler), str(tmp_path))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(episodes=None), "one of them is to be given"),
    (dict(reward=reward.RewardConfig(format_weight=1.0)), r"reward\.length"),
    (dict(microbatches=2), "may give 4 parts, more than the 3 rows"),
    (
      dict(episodes=EPISODES),
      r"limits\.window=400 exceeds sampler\.engine\.max_length=96",
    ),
  ],
)
def test_bad_runs(change, message):
  with pytest.raises(ValueError, match=message):
    small_run(**change)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(kind="general"), "path=''"),
    (dict(kind="calculator", path="x"), "path='x'"),
    (dict(kind="lookups", domains=("no",)), r"domains=\('no',\) must be of"),
    (dict(kind="calculator", renamed=True), "renamed is for kind='lookups'"),
    (dict(kind="calculator", size=1), "terms=1"),
    (dict(kind="calculator", weight=0.0), "weight=0.0"),
    (dict(kind="repairs", size=7), "size=7 of kind='repairs' must be 1 to 6"),
    (dict(kind="searches", size=3), "size=3 of kind='searches'"),
    (dict(kind="searches", size=1, largest=99), "largest=99 4 to 32"),
  ],
)
def test_bad_environments(fields, message):
  with pytest.raises(ValueError, match=message):
    episode_config.EnvironmentConfig(**fields)
