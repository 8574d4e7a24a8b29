"""The protocol of environments, on the general family."""

import asyncio
import json
import math
import os
import sqlite3
import time

import pytest

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import export
from tests.support import general_world as world


@pytest.fixture(scope="module")
def chosen():
  record, task = world.tasks("trip")[0]
  return record, task


def call(name, **arguments):
  return protocol.ToolCall(name=name, arguments=arguments)


def submit(answer):
  text = answer if isinstance(answer, str) else json.dumps(answer)
  return call("submit_result", answer_text=text)


def calls_of(record, task):
  messages, _ = export.trajectory(record, task)
  functions = [
    message["tool_calls"][0]["function"]
    for message in messages
    if "tool_calls" in message
  ]
  return [
    protocol.ToolCall(name=f["name"], arguments=json.loads(f["arguments"]))
    for f in functions
  ]


def test_an_episode(chosen):
  record, task = chosen

  async def play():
    environment: protocol.Environment = general.GeneralEnvironment(*chosen)
    start = await environment.reset()
    assert task["statement"] in start.observation
    assert json.dumps(task["answer_schema"]) in start.observation
    assert [t.name for t in start.tools] == [t["name"] for t in record["tools"]]
    for secret in ("solution", "verifier"):
      assert task[secret] not in start.observation
    step = await environment.step(call("get_all_cities"))
    assert json.loads(step.observation) == [
      row["name"] for row in record["rows"]["city"]
    ]
    assert not step.done and await environment.verify() == 0
    step = await environment.step(submit(task["answer"]))
    assert step.done and await environment.verify() == 1
    with pytest.raises(RuntimeError):
      await environment.step(call("get_all_cities"))
    await environment.reset()
    assert await environment.verify() == 0
    await environment.close()
    await environment.close()

  asyncio.run(play())


def test_many_episodes_at_once():
  chosen = world.tasks("find", "bundle", "trip", "total")

  async def play(record, task):
    environment = general.GeneralEnvironment(record, task)
    await environment.reset()
    for step in calls_of(record, task):
      await environment.step(step)
      await asyncio.sleep(0)
    reward = await environment.verify()
    await environment.close()
    return reward

  async def play_all():
    return await asyncio.gather(*(play(*pair) for pair in chosen))

  assert asyncio.run(play_all()) == [1.0] * len(chosen)


def test_a_snapshot_continues(chosen):
  record, task = chosen

  async def play():
    environment = general.GeneralEnvironment(record, task, max_steps=3)
    await environment.reset()
    await environment.step(call("get_all_cities"))
    taken = json.loads(json.dumps(environment.snapshot()))
    await environment.step(submit(task["answer"]))
    assert await environment.verify() == 1
    other = general.GeneralEnvironment(record, task, max_steps=3)
    await other.restore(taken)
    assert await other.verify() == 0
    assert not (await other.step(call("get_all_cities"))).done
    # The first step counts, though another object made it.
    assert (await other.step(call("get_all_cities"))).done
    with pytest.raises(ValueError, match="snapshot"):
      await other.restore({**taken, "task": "another"})

  asyncio.run(play())


def test_tools_answer_what_the_rows_hold():
  """Every lister and informer style, against the rows themselves."""
  seen = set()
  for record in world.records():
    environment = general.GeneralEnvironment(record, record["tasks"][0])
    environment.start()
    rows = record["rows"]
    parents = world.parents_of(rows)
    for tool in record["tools"]:
      shape, name = tool["shape"]["kind"], tool["name"]
      ask = lambda name=name, environment=environment, **given: json.loads(
        environment.call(name, given).observation
      )
      keys = list(tool["parameters"]["properties"])
      table = next((t for t in parents if name.endswith(f"_{t}")), None)
      if shape == "keywords":
        for row in rows[keys[1]]:
          columns = tool["shape"]["columns"]
          got = ask(info_keywords=columns, **{keys[1]: row["name"]})
          assert got == {column: row[column] for column in columns}
      elif name.startswith("describe_"):
        for row in rows[table]:
          want = {k: v for k, v in row.items() if k != "name"}
          assert ask(**{table: row["name"]}) == want
      elif "_of_" in name and shape == "value":
        column = name[len("get_") : name.index("_of_")]
        for row in rows[table]:
          assert ask(**{table: row["name"]}) == row[column]
      elif name.startswith("get_all_") and keys:
        listed = [t for t, p in parents.items() if p == keys[0]]
        got = [ask(**{keys[0]: row["name"]}) for row in rows[keys[0]]]
        flat = [n for names in got for n in names]
        assert any(flat == [r["name"] for r in rows[t]] for t in listed)
      else:
        continue
      seen.add((shape, name.split("_")[0]))
  assert len(seen) >= 4


@pytest.mark.parametrize(
  ("name", "arguments", "told"),
  [
    ("no_such_tool", {}, "no tool"),
    ("get_all_hotels_by_city", {}, "required"),
    ("get_all_hotels_by_city", {"city": 3}, "not of type"),
    ("get_all_hotels_by_city", {"city": "Atlantis"}, "no city is called"),
    ("get_all_hotels_by_city", {"city": "\ud800"}, "no Unicode"),
    ("get_all_hotels_by_city", {"city": "x", "y": 1}, "Additional"),
    ("get_all_hotels_by_city", {"city": "'; DROP TABLE hotel; --"}, "no city"),
    ("get_infos_by_city", {"info_keywords": [], "city": "x"}, "info_keywords"),
    ("get_infos_by_city", {"info_keywords": ["x"], "city": "x"}, "not one of"),
    ("get_all_cities", {"city": math.nan}, "Additional"),
    ("get_all_cities", [], "not of type"),
    ("get_all_cities", None, "not of type"),
    ("submit_result", {"answer_text": None}, "not of type"),
  ],
)
def test_a_bad_call_is_an_observation(chosen, name, arguments, told):
  environment = general.GeneralEnvironment(*chosen)
  environment.start()
  step = environment.call(name, arguments)
  assert step.observation.startswith("error: ") and told in step.observation
  assert len(step.observation) < 400 and not step.done
  # The episode goes on.
  step = environment.call(
    "submit_result", submit(chosen[1]["answer"]).arguments
  )
  assert step.done and environment.reward() == 1


@pytest.mark.parametrize(
  "text",
  [
    "",
    "null",
    "[]",
    "NaN",
    "[" * 90_000,
    "[" * 200_000,
    "9" * 6000,
    '{"a": 1',
    '[{"city": "\\ud800"}]',
    "true",
  ],
)
def test_a_bad_answer_is_worth_nothing(chosen, text):
  environment = general.GeneralEnvironment(*chosen)
  environment.start()
  assert environment.call("submit_result", {"answer_text": text}).done
  assert environment.reward() == 0


def test_names_that_are_no_unicode_are_worth_nothing(chosen):
  record, task = chosen
  environment = general.GeneralEnvironment(record, task)
  answer = [{**day, "hotel": "\ud800"} for day in task["answer"]]
  assert not environment.judge.accepts(answer)


@pytest.mark.parametrize(
  "sql",
  [
    "DELETE FROM hotel",
    "CREATE TABLE mine (a)",
    "PRAGMA query_only = OFF",
    "ATTACH DATABASE '/tmp/dsv32-attached' AS a",
    "VACUUM INTO '/tmp/dsv32-attached'",
  ],
)
def test_the_database_can_only_be_read(chosen, sql):
  environment = general.GeneralEnvironment(*chosen)
  with pytest.raises(sqlite3.DatabaseError, match="authoriz"):
    environment.connection.execute(sql)
  assert not os.path.exists("/tmp/dsv32-attached")


def test_text_in_a_typed_tool_is_no_sql():
  """Whatever a name says, it is a name that is not there."""
  injections = (
    "' OR '1'='1",
    "x'; DROP TABLE hotel; --",
    '" OR 1=1 --',
    "x' UNION SELECT name FROM sqlite_master --",
    "%",
    "\0",
  )
  tried = 0
  for record, task in world.tasks("find", "trip"):
    environment = general.GeneralEnvironment(record, task)
    for tool in record["tools"]:
      properties = tool["parameters"]["properties"]
      free = [
        name
        for name, schema in properties.items()
        if schema["type"] == "string" and "enum" not in schema
      ]
      if tool["name"] == "submit_result" or not free:
        continue
      for text in injections:
        arguments = {
          name: text if name in free else _least(schema)
          for name, schema in properties.items()
        }
        with pytest.raises(tools.ToolError):
          environment.tools.value(tool["name"], arguments)
        tried += 1
  assert tried > 100


def _least(schema):
  """A value that fits."""
  match schema:
    case {"enum": values}:
      return values[0]
    case {"type": "integer"}:
      return 1
  return [schema["items"]["enum"][0]]


def test_steps_are_cheap():
  """A scripted policy makes well over a thousand steps a second."""
  scripts = [(r, t, calls_of(r, t)) for r, t in world.tasks("find", "trip")]
  begun = time.process_time()
  for record, task, calls in scripts:
    environment = general.GeneralEnvironment(record, task)
    environment.start()
    for step in calls:
      environment.call(step.name, step.arguments)
    assert environment.reward() == 1
  seconds = time.process_time() - begun
  assert sum(len(calls) for _, _, calls in scripts) / seconds > 2000


def test_misuse_is_told(chosen):
  with pytest.raises(ValueError, match="max_steps=0"):
    general.GeneralEnvironment(*chosen, max_steps=0)
  environment = general.GeneralEnvironment(*chosen)
  with pytest.raises(RuntimeError, match="reset"):
    environment.call("get_all_cities", {})
