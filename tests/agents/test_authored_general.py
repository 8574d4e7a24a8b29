"""General environments that a policy writes: what passes, and what does not."""

import asyncio
import dataclasses
import json

import pytest

from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.environments import written
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis.general import authored
from dsv32_jax.agents.synthesis.general import workshop
from tests.support import attacks
from tests.support import authors

CONFIG = authored.GeneralAuthoringConfig(
  num_tasks=1, max_candidates=3, attempts=2, concurrency=1, turns=30
)


@pytest.fixture(scope="module")
def box():
  return workspaces.sandbox(attacks.find("bubblewrap"))


def policy(*replies):
  return policies.ScriptedPolicy(policies.replies(*replies))


def test_a_policy_writes_an_environment(tmp_path, box):
  """Its task is right by the rows, and what it gets wrong is recorded."""
  refused = [
    authors.proposal(verifier="def verify(answer):\n  return True\n"),
    authors.proposal(wrong_answers=[]),
  ]
  script = [*authors.begin(), *refused, *authors.whole()[4:]]
  solver = policies.ScriptedPolicy(authors.solver)
  authored.run(CONFIG, tmp_path, policy(*script), solver, box)
  authored.export(tmp_path, box)
  (row,) = authoring.rows(tmp_path)
  (task,) = row["tasks"]
  lamps = row["rows"]["lamp"]
  best = max(lamps, key=lambda lamp: lamp["watts"])
  assert task["answer"] == {"lamps": [best["name"]], "watts": best["watts"]}
  assert len(lamps) == 24 and task["level"] == 2
  assert [step["solution_calls"] for step in task["history"]] == [3, 9]
  assert task["attempts_until_solved"] == 1
  told = list(tables.read_jsonl(tmp_path / "rejections.jsonl"))
  assert [x["reason"] for x in told] == [
    "the verifier accepts wrong answer 1",
    "only 0 different wrong answers",
  ]
  (played,) = tables.read_jsonl(tmp_path / "trajectories.jsonl")
  assert played["reward"] == 1.0
  assert len(json.loads(played["messages"])) == 2 + 2 * 10
  (made,) = tables.read_jsonl(tmp_path / "tasks.jsonl")
  assert made["id"] == played["id"] == task["id"]
  found = authored.report(tmp_path)
  assert found["environments"] == found["tasks"] == 1


def test_what_does_not_pass(box):
  """One proposal after another, each with one thing wrong."""
  right = {"lamps": ["lamp 33"], "watts": 5 + (37 * 3 + 11 * 3) % 90}
  solution = authors.SOLUTION.format(floors=[0])
  wrong = {
    "no tool calls": (
      {"solution": "def solve():\n  return {'lamps': ['x'], 'watts': 1}\n"},
      "makes 0 tool calls, not 1",
    ),
    "reads a file": (
      {"solution": "def solve():\n  return open('lamps.sqlite')\n"},
      "'open' is neither a tool nor",
    ),
    "a query of its own": (
      {"solution": "def solve():\n  return query('SELECT 1')\n"},
      "'query' is neither a tool nor",
    ),
    "raises": (
      {"solution": "def solve():\n  return get_rooms(floor=[])\n"},
      "",
    ),
    "never ends": (
      {"solution": "def solve():\n  while True:\n    get_rooms(floor=0)\n"},
      "more than 2000 tool calls",
    ),
    "no agent's call": (
      {"solution": solution.replace("floor=floor", "floor=floor * 1.0")},
      "a call that no agent can make",
    ),
    "another schema": (
      {"solution": solution.replace('"watts": best}', '"watts": "many"}')},
      "is not of the schema",
    ),
    "refused by the verifier": (
      {"verifier": "def verify(answer):\n  return answer['watts'] == 3\n"},
      "refuses the solution's answer",
    ),
    "no bool": (
      {"verifier": "def verify(answer):\n  return 1\n"},
      "refuses the solution's answer",
    ),
    "nearly anything": (
      {"verifier": "def verify(answer):\n  return answer['watts'] < 1000\n"},
      "answers drawn at random",
    ),
    "a verifier that imports": (
      {"verifier": "def verify(answer):\n  import os\n  return True\n"},
      "Import is not allowed",
    ),
    "a verifier that attaches": (
      {
        "verifier": (
          "def verify(answer):\n"
          "  query(\"ATTACH DATABASE '/tmp/x' AS x\")\n  return True\n"
        )
      },
      "not authorized",
    ),
    "tells the answer": (
      {"statement": f"Say {right['lamps'][0]} and {right['watts']}."},
      "tells the answer",
    ),
    "wrong answers that are right": (
      {"wrong_answers": [right] * 5},
      "is the solution's own",
    ),
    "wrong answers of another form": (
      {"wrong_answers": [{"lamps": n} for n in range(5)]},
      "a wrong answer is not of the schema",
    ),
    "a pattern that takes for ever": (
      {"answer_schema": {"type": "string", "pattern": "(a+)+$"}},
      "may not use 'pattern'",
    ),
    "a tool that does the work": (
      {
        "solution": (
          "def solve():\n  get_rooms(floor=0)\n  get_rooms(floor=1)\n"
          "  return get_best()\n"
        )
      },
      "one call of get_best tells the answer",
    ),
    "a reference": ({"answer_schema": {"$ref": "http://x"}}, "may not use"),
  }
  shop = workshop.Workshop("lamps", box)
  best = authors.VERIFIER.format(floors="(0)").partition("  return")[0]
  best = best.replace("def verify(answer)", "def get_best()")
  best += "  return {'lamps': [rows[0][0]], 'watts': rows[0][1]}\n"
  calls = [
    *authors.begin(),
    authors.tool(
      "get_rooms",
      name="get_best",
      parameters=authors.parameters(),
      source=best,
    ),
    *(authors.proposal(**changes) for changes, _ in wrong.values()),
  ]
  told = observe(shop, calls)[5:]
  for (name, (_, want)), text in zip(wrong.items(), told, strict=True):
    assert text.startswith("error: the task does not pass: "), name
    assert want in text, (name, text)
  assert len(shop.work.rejections) == len(wrong)
  assert not shop.work.current


def observe(environment, calls):
  """Plays calls; returns the observations."""

  async def play():
    await environment.reset()
    found = []
    for message in calls:
      function = message["tool_calls"][0]["function"]
      call = protocol.ToolCall(
        name=function["name"], arguments=json.loads(function["arguments"])
      )
      found.append((await environment.step(call)).observation)
    await environment.close()
    return found

  return asyncio.run(play())


@pytest.mark.slow
def test_data_and_tools_are_checked(tmp_path, box):
  sql = "python3 -c \"import sqlite3; c = sqlite3.connect('{0}'); {1}\""
  column = "c.execute('CREATE TABLE t (a)')"
  insert = "c.execute('INSERT INTO t VALUES ({0})'); c.commit()"
  say = authors.say
  path = tmp_path / "corpus.sqlite"
  search_index.build(
    path, [search_index.Document(name="d", title="Lamps", text="A lamp.")]
  )
  source = search_index.LocalIndex(path)
  shop = workshop.Workshop("lamps", box, source=source)
  told = observe(
    shop,
    [
      say("search", query="lamp"),
      say("take_database", path="nothing"),
      say("take_database", path="/etc/passwd"),
      say("shell", command=sql.format("e", column)),
      say("take_database", path="e"),
      say(
        "shell", command=sql.format("n", f"{column}; {insert.format('NULL')}")
      ),
      say("take_database", path="n"),
      authors.tool("get_rooms"),
      authors.proposal(),
      *authors.begin()[:2],
      authors.tool("get_rooms", name="query"),
      authors.tool("get_rooms", source="def other():\n  return 1\n"),
      authors.tool("get_rooms", source="while True:\n  pass\n"),
      authors.tool("get_rooms", source="import os\nos._exit(0)\n"),
      authors.tool("get_rooms", parameters={"type": "object", "$ref": "x"}),
      authors.tool("get_rooms"),
      say("try_tool", name="get_rooms", arguments={"floor": "0"}),
      say("try_tool", name="get_rooms", arguments={"floor": 0}),
      say("next_task"),
      authors.tool("get_lamps"),
      authors.proposal(),
      authors.tool("get_rooms"),
      authors.begin()[1],
      authors.proposal(),
      say("next_task"),
      authors.proposal(),
    ],
  )
  source.close()
  wants = (
    "d\nLamps",
    "error: nothing: ",
    "error: /etc/passwd: ",
    "",
    "'t' has no rows",
    "",
    "other than numbers and text",
    "there is no data yet",
    "there is no data yet",
    "",
    'Taken; rows by table: {"lamp": 24, "room": 6}',
    "'query' must be a name",
    "defines no function get_rooms",
    "limit: wall",
    "the process ended",
    "may not use '$ref'",
    "has 1 tools",
    "'0' is not of type 'integer'",
    '["room 0", "room 3"]',
    "no version of the current task",
    "has 2 tools",
    "passes at level 1 of 4",
    "cannot change any more",
    "cannot change any more",
    "makes 3 tool calls, not 4",
    "1 tasks are kept",
    "it equals another task",
  )
  for text, want in zip(told, wants, strict=True):
    assert want in text, (want, text)


def test_scripts_that_misbehave_lose_their_candidate(tmp_path, box):
  """Malformed calls, an endless loop, no work, and an unsolvable task."""
  scripts = [
    [{"role": "assistant", "content": "I would rather not."}],
    [authors.say("shell", commands=1), policies.call("shell", "{")] * 20,
    [*authors.begin(), authors.proposal(), authors.say("finish")],
    authors.whole(),
  ]
  given = iter(scripts)

  class Several:
    tokenizer = None

    async def complete(self, conversation, *, max_tokens):
      if not any(m["role"] == "assistant" for m in conversation.messages):
        self.script = policy(*next(given))
      return await self.script.complete(conversation, max_tokens=max_tokens)

  gives_up = policy(*[authors.say("submit_result", answer_text="{}")] * 9)
  more = dataclasses.replace(CONFIG, max_candidates=4)
  authored.run(more, tmp_path, Several(), gives_up, box)
  assert [row["reason"] for row in authoring.rows(tmp_path)] == [
    "nothing was handed in, the episode ended with answered",
    "nothing was handed in, the episode ended with max_turns",
    "no task was kept",
    "no task was kept",
  ]
  told = [row["rejections"] for row in authoring.rows(tmp_path)[2:]]
  assert [x["reason"] for rows in told for x in rows] == [
    "its solution makes less than 4 tool calls",
    "pass@2 is zero",
  ]


@pytest.mark.slow
def test_equal_data_are_made_once_and_a_run_goes_on(tmp_path, box):
  """What is decided is not asked for again, by a policy that counts."""
  asked = []
  shifts = {0: 5, 1: 5, 2: 9}

  def script(messages):
    said = sum(m["role"] == "assistant" for m in messages)
    if not said:
      asked.append(len(asked))
    return authors.whole(shifts[asked[-1]])[said]

  author = policies.ScriptedPolicy(script)
  solver = policies.ScriptedPolicy(authors.solver)
  authored.run(CONFIG, tmp_path, author, solver, box)
  assert asked == [0]
  path = tmp_path / authoring.CANDIDATES_FILE
  first = path.read_bytes()
  path.write_bytes(first + b'{"id": "authored-00')  # as a kill leaves it
  more = dataclasses.replace(CONFIG, num_tasks=2)
  authored.run(more, tmp_path, author, solver, box)
  assert asked == [0, 1, 2] and path.read_bytes().startswith(first)
  rows = authoring.rows(tmp_path)
  assert [row["id"] for row in rows] == [f"authored-{n:06d}" for n in range(3)]
  assert [row["status"] for row in rows] == ["kept", "rejected", "kept"]
  assert rows[1]["reason"] == "its data equal those of another"
  with pytest.raises(ValueError, match="was made with levels=4, not 2"):
    authored.run(
      dataclasses.replace(more, levels=2), tmp_path, author, solver, box
    )


def test_an_episode_of_a_written_environment(box):
  """Tools keep nothing for the next episode, and never reach the verifier."""
  counting = {
    "name": "count",
    "description": "Counts calls.",
    "parameters": authors.parameters(),
    "source": (
      "calls = []\n\n\ndef count():\n  calls.append(1)\n"
      "  import sqlite3\n  sqlite3.connect = None\n  return len(calls)\n"
    ),
  }
  record = {"rows": {"t": [{"a": 7}]}, "tools": [counting]}
  task = {
    "id": "t",
    "statement": "How many?",
    "answer_schema": {"type": "integer"},
    "verifier": (
      "def verify(answer):\n  return [[answer]] == query('SELECT a FROM t')\n"
    ),
  }
  environment = written.WrittenEnvironment(record, task, box)
  call = lambda name, **arguments: protocol.ToolCall(
    name=name, arguments=arguments
  )

  async def play():
    seen = []
    for text in ("7", "8", "7.5", "true", "[", '"7"'):
      await environment.reset()
      steps = [await environment.step(call("count")) for _ in range(2)]
      seen.append([step.observation for step in steps])
      snapshot = environment.snapshot()
      await environment.restore(snapshot)
      seen[-1].append((await environment.step(call("count"))).observation)
      seen[-1].append((await environment.step(call("fly"))).observation[:9])
      await environment.step(call("submit_result", answer_text=text))
      seen[-1].append(await environment.verify())
    await environment.close()
    return seen

  seen = asyncio.run(play())
  assert [row[:4] for row in seen] == [["1", "2", "3", "error: no"]] * 6
  assert [row[4] for row in seen] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
