"""Coding and search in small: what solves them, and what does not."""

import asyncio
import itertools
import random
import re

import pytest

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import repairs as repair_environment
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.synthesis.code import repairs
from dsv32_jax.agents.synthesis.search import small


def drawn(name, count=40, size=2):
  """(environment, calls) of some tasks."""
  generator = random.Random(f"{name} {size}")
  for _ in range(count):
    if name == "repairs":
      one = repairs.draw(size, 9, generator)
      yield repair_environment.RepairEnvironment(one.task), one.solution
    else:
      task = small.draw(size, 16, generator)
      yield small.SmallSearchEnvironment(task), task.solution()


async def play(environment, calls):
  """Plays calls until it is done; returns observations and the reward."""
  start = await environment.reset()
  seen = [start.observation]
  for name, arguments, *_ in calls:
    call = protocol.ToolCall(name=name, arguments=arguments)
    step = await environment.step(call)
    seen.append(step.observation)
    if step.done:
      break
  reward = await environment.verify()
  await environment.close()
  return seen, reward


def reward_of(environment, *calls):
  return asyncio.run(play(environment, calls))[1]


@pytest.mark.parametrize(
  "name, size",
  [("repairs", 1), ("repairs", 3), ("searches", 1), ("searches", 2)],
)
def test_solutions_earn_the_reward_and_parts_of_them_do_not(name, size):
  for environment, calls in drawn(name, 20, size):
    seen, reward = asyncio.run(play(environment, calls))
    assert reward == 1
    assert len(seen) == len(calls) + 1 <= 6
    assert not any(text.startswith("error") for text in seen), seen
  for environment, calls in drawn(name, 20, size):
    least = 2 if name == "repairs" else 1
    assert reward_of(environment, *calls[:-least]) == 0


def test_repairs_are_what_their_files_say():
  generator = random.Random(0)
  for _ in range(40):
    task = repairs.draw(3, 9, generator).task
    assert sum(not one.is_right for one in task.modules) == 1
    for one in task.modules:
      scope = {}
      exec(one.text, scope)
      returned = [scope[one.name](*case) for case, _ in one.tests]
      assert tuple(returned) == one.returned
      wrong = [
        case
        for case, wanted in (*one.tests, *one.hidden)
        if scope[one.name](*case) != wanted
      ]
      assert one.is_right == (not wrong)
      assert one.is_right or one.tests[0][0] in wrong
    shown, _ = asyncio.run(
      play(repair_environment.RepairEnvironment(task), [("run_tests", {})])
    )
    (broken,) = [one for one in task.modules if not one.is_right]
    assert shown[1].startswith(f"{broken.name}(") and "\n" not in shown[1]


@pytest.mark.parametrize(
  "text, shown",
  [
    # Deeper than Python's own representation of lists goes.
    ("import json\njson.dumps = lambda *_, **__: TEXT\n", "is list, not"),
    ("raise ValueError(chr(0xD800))\n", "ValueError: ?"),
  ],
)
def test_values_of_any_form_are_wrong_and_no_fault_of_the_environment(
  text, shown
):
  environment, _ = next(drawn("repairs", 1, 1))
  module = environment.task.modules[0]
  nested = "[" * 900 + "]" * 900
  values = ",".join([nested] + ["0"] * (len(module.tests) - 1))
  text = text.replace("TEXT", repr(f'{{"values": [{values}]}}'))
  call = {"file": module.file, "old": "def ", "new": f"{text}def "}
  seen, reward = asyncio.run(
    play(environment, [("edit", call), ("run_tests", {})])
  )
  assert seen[1] == "done" and shown in seen[2].splitlines()[0]
  assert reward == 0


def answer_of(task):
  """Follows a question through the pages by their words alone."""
  text = " ".join(re.sub(r" \(p\d\)", "", x.text) for x in task.documents)

  def find(pattern):
    return re.search(pattern, text)[1]

  def entity(phrase):
    for pattern, wanted in (
      (r"the mayor of (\w+)", r"mayor of {} is (\w+)\."),
      (r"the head of (\w+)", r"head of {} is (\w+)\."),
      (r"the town of (\w+)", r"{} lives in (\w+)\."),
      (r"the firm of (\w+)", r"{} works for (\w+)\."),
    ):
      if match := re.fullmatch(pattern, phrase):
        return find(wanted.format(match[1]))
    return phrase

  for pattern, wanted in (
    (r"In which town does (.*) live\?", r"{} lives in (\w+)\."),
    (r"For which firm does (.*) work\?", r"{} works for (\w+)\."),
    (r"Who is the mayor of (.*)\?", r"mayor of {} is (\w+)\."),
    (r"Who is the head of (.*)\?", r"head of {} is (\w+)\."),
  ):
    if match := re.fullmatch(pattern, task.question):
      return find(wanted.format(entity(match[1])))
  raise AssertionError(task.question)


@pytest.mark.parametrize("depth", [1, 2])
def test_answers_of_searches_are_in_their_pages(depth):
  generator = random.Random(depth)
  for _ in range(100):
    task = small.draw(depth, 16, generator)
    assert task.answer == answer_of(task), task
    assert len(task.pages) == depth and len(task.documents) == 8


def test_one_call_solves_next_to_nothing():
  names = list(itertools.chain(*small.NAMES.values()))
  for name in (names[0], names[33], names[-33]):
    call = ("submit_result", {"answer_text": name})
    rewards = [reward_of(one, call) for one, _ in drawn("searches", 60, 1)]
    assert sum(rewards) < 0.2 * len(rewards)
  for old, new in (
    ("+", "-"),
    ("-", "+"),
    ("max", "min"),
    ("a", "b"),
    ("c", "a"),
  ):
    rewards = []
    for environment, _ in drawn("repairs", 60, 1):
      file = environment.task.modules[0].file
      call = ("edit", {"file": file, "old": old, "new": new})
      rewards.append(reward_of(environment, call))
    assert sum(rewards) < 0.2 * len(rewards), (old, new)
  for name in ("repairs", "searches"):
    submit = ("submit", {}) if name == "repairs" else ("search", {"query": "a"})
    assert not any(reward_of(one, submit) for one, _ in drawn(name, 20, 1))


def test_random_calls_solve_next_to_nothing():
  generator = random.Random(0)

  async def stumble(environment):
    start = await environment.reset()
    words = re.findall(r"[\w.]+", start.observation)
    for _ in range(5):
      tool = generator.choice(start.tools)
      arguments = {
        key: generator.choice(words) for key in tool.parameters["required"]
      }
      call = protocol.ToolCall(name=tool.name, arguments=arguments)
      step = await environment.step(call)
      if step.done:
        break
      words += re.findall(r"[\w.]+|[-+*%]|//", step.observation)
    reward = await environment.verify()
    await environment.close()
    return reward

  for name in ("repairs", "searches"):
    rewards = [asyncio.run(stumble(x)) for x, _ in drawn(name, 100, 1)]
    assert sum(rewards) < 0.05 * len(rewards), name


def test_what_an_edit_does_wrong_is_told_or_costs_the_reward():
  environment, calls = next(drawn("repairs", 1, 1))
  file, old = calls[1][1]["file"], calls[1][1]["old"]

  def edit(new, old=old, file=file):
    return ("edit", {"file": file, "old": old, "new": new})

  seen, reward = asyncio.run(
    play(
      environment,
      [
        edit("1", file="none.py"),
        edit("1", old="no such text"),
        edit("1", old="a"),
        edit("1" * 3000),
        ("edit", {"file": file}),
        ("remove", {}),
        edit("1 +"),
        ("run_tests", {}),
      ],
    )
  )
  assert [text.startswith("error") for text in seen] == [False] + [True] * 6 + [
    False
  ] * 2
  assert "no such file" in seen[1] and "0 times" in seen[2]
  assert "times" in seen[3] and "exceed" in seen[4]
  assert "SyntaxError" in seen[8] and reward == 0


@pytest.mark.parametrize(
  "new",
  ["[0 for _ in iter(int, 1)]", "__import__('os').abort()", "None", "True"],
)
def test_a_file_that_hangs_or_crashes_costs_its_own_reward(new, caplog):
  (one, calls), (other, right) = drawn("repairs", 2, 1)
  arguments = {**calls[1][1], "new": new}
  assert reward_of(one, ("edit", arguments)) == 0
  ended = [x for x in caplog.records if "was ended" in x.getMessage()]
  assert len(ended) == (new not in ("None", "True"))
  assert reward_of(other, *right) == 1


@pytest.mark.parametrize("name", ["repairs", "searches"])
def test_an_episode_can_be_put_back(name):
  (one, calls), (other, _) = drawn(name, 2, 1)

  async def again():
    await one.reset()
    await other.reset()
    for name, arguments, _ in calls[:-2]:
      await one.step(protocol.ToolCall(name=name, arguments=arguments))
    saved = one.snapshot()
    with pytest.raises(ValueError, match="is not"):
      await other.restore(saved)
    rewards = []
    for _ in range(2):
      for name, arguments, _ in calls[-2:]:
        await one.step(protocol.ToolCall(name=name, arguments=arguments))
      rewards.append(await one.verify())
      await one.restore(saved)
    rewards.append(await one.verify())
    for environment in (one, other):
      await environment.close()
      await environment.close()
    return rewards

  assert asyncio.run(again()) == [1, 1, 0]


def test_an_index_in_memory_finds_what_a_file_finds(tmp_path):
  documents = small.draw(2, 16, random.Random(1)).documents
  path = tmp_path / "index.sqlite"
  identity = search_index.build(path, documents)
  held, kept = (
    search_index.MemoryIndex(documents),
    search_index.LocalIndex(path),
  )
  assert held.identity == identity == kept.identity
  for query in (documents[0].title, "lives", "mayor head", '"works for"'):
    one, other = (
      index.search_now(query, offset=0, count=5) for index in (held, kept)
    )
    assert one and one == other
  assert list(held.documents()) == list(documents)
  for index in (held, kept):
    index.close()
  with pytest.raises(ValueError, match="at least one document"):
    search_index.MemoryIndex(())
