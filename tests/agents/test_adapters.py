"""Environments behind gymnasium's API, and MCP servers as environments."""

import asyncio
import json
import os
import pathlib
import sys
import time
import warnings

import gymnasium
from gymnasium.utils import env_checker
import mcp
import pytest

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy
from dsv32_jax.agents.adapters import gymnasium_api
from dsv32_jax.agents.adapters import mcp as mcp_adapter
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import protocol
from tests.support import general_world as world

SERVER = pathlib.Path(__file__).parents[1] / "support" / "mcp_server.py"


def call(name, **arguments):
  return protocol.ToolCall(name=name, arguments=arguments)


@pytest.fixture
def started(tmp_path):
  """Returns what makes clients of new servers, and their process ids."""
  path = tmp_path / "pids"

  def make():
    command = [str(SERVER), str(path)]
    return mcp.Client(
      mcp.StdioServerParameters(command=sys.executable, args=command)
    )

  yield make, lambda: [int(line) for line in path.read_text().split()]
  deadline = time.monotonic() + 10
  while any(map(is_alive, path.read_text().split())):
    assert time.monotonic() < deadline, "a server is left"
    time.sleep(0.05)


def is_alive(pid):
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return False
  return True


def notes_task(**changed):
  def verify(calls, answer):
    wrote = [c.arguments["text"] for c in calls if c.name == "add_note"]
    return float(answer is not None and answer == ",".join(wrote))

  values = {"id": "notes", "prompt": "Take notes.", "verify": verify}
  return mcp_adapter.McpTask(**{**values, **changed})


def test_a_server_is_an_environment(started):
  make, pids = started

  async def play():
    played: protocol.Environment = mcp_adapter.McpEnvironment(
      notes_task(), make
    )
    start = await played.reset()
    assert start.observation == "Take notes."
    names = [tool.name for tool in start.tools]
    assert names == ["add_note", "read_notes", "nap", "leave", "submit_result"]
    assert start.tools[0].description.startswith("Keeps a note")
    assert start.tools[0].parameters["required"] == ["text"]
    step = await played.step(call("add_note", text="caf\u00e9"))
    assert step == protocol.Step(observation="1 notes", done=False)
    step = await played.step(call("add_note", text=3))
    assert step.observation.startswith("error: arguments: $.text")
    step = await played.step(call("read_notes", first=9))
    assert step.observation.startswith("error: ")
    assert "not so many" in step.observation
    taken = json.loads(json.dumps(played.snapshot()))
    await played.step(call("add_note", text="b"))
    step = await played.step(call("read_notes"))
    assert "caf\u00e9" in step.observation and "b" in step.observation
    assert await played.verify() == 0
    step = await played.step(call("submit_result", answer_text="caf\u00e9,b"))
    assert step.done and await played.verify() == 1
    # Another server, brought to where the first was.
    await played.restore(taken)
    step = await played.step(call("read_notes"))
    assert step.observation == "caf\u00e9"
    await played.reset()
    assert (await played.step(call("add_note", text="x"))).observation == (
      "1 notes"
    )
    assert len(set(pids())) == 3
    with pytest.raises(ValueError, match="snapshot"):
      await played.restore({**taken, "task": "another"})
    await played.close()
    await played.close()

  asyncio.run(play())


def test_only_tools_that_are_asked_for_are_shown(started):
  make, _ = started

  async def play():
    task = notes_task(tools=("read_notes",))
    played = mcp_adapter.McpEnvironment(task, make)
    start = await played.reset()
    assert [t.name for t in start.tools] == ["read_notes", "submit_result"]
    step = await played.step(call("leave"))
    assert step.observation.startswith("error: no tool 'leave'")
    await played.close()
    played = mcp_adapter.McpEnvironment(notes_task(tools=("fly",)), make)
    with pytest.raises(ValueError, match="no tool 'fly'"):
      await played.reset()
    await played.close()

  asyncio.run(play())


def test_an_episode_of_a_server(started):
  make, _ = started
  script = policy.replies(
    policy.call("add_note", '{"text": "a"}'),
    policy.call("submit_result", '{"answer_text": "a"}'),
  )
  episode = asyncio.run(
    loop.run_episode(
      policy.ScriptedPolicy(script),
      lambda: mcp_adapter.McpEnvironment(notes_task(), make),
      episode_id="1",
    )
  )
  assert (episode.result.reward, episode.result.finish) == (1.0, "done")


def test_a_server_that_ends_costs_its_episode(started):
  make, _ = started
  episode = asyncio.run(
    loop.run_episode(
      policy.ScriptedPolicy(policy.replies(policy.call("leave", "{}"))),
      lambda: mcp_adapter.McpEnvironment(notes_task(), make),
      episode_id="1",
    )
  )
  assert (episode.result.reward, episode.result.finish) == (0.0, "crashed")
  assert "the server ended in a call of leave" in episode.result.error


def test_a_server_that_hangs_is_given_up(started):
  make, _ = started

  async def play():
    played = mcp_adapter.McpEnvironment(notes_task(), make)
    await played.reset()
    with pytest.raises(TimeoutError):
      await asyncio.wait_for(played.step(call("nap", seconds=60)), 1)
    await asyncio.wait_for(played.close(), 20)
    # So is one that is not even up yet.
    with pytest.raises(TimeoutError):
      await asyncio.wait_for(played.reset(), 0.05)
    await asyncio.wait_for(played.close(), 20)

  asyncio.run(play())


def test_a_server_that_does_not_start_is_told(tmp_path):
  missing = mcp.StdioServerParameters(command=str(tmp_path / "no_such_server"))

  async def play():
    played = mcp_adapter.McpEnvironment(
      notes_task(), lambda: mcp.Client(missing)
    )
    with pytest.raises((OSError, ExceptionGroup)):
      await played.reset()
    await played.close()

  asyncio.run(play())


def test_an_environment_is_gymnasiums():
  record, task = world.tasks("find")[0]
  played = gymnasium_api.GymnasiumEnvironment(
    general.GeneralEnvironment(record, task)
  )
  with pytest.raises(RuntimeError, match="reset"):
    played.step({"name": "x", "arguments": "{}"})
  with warnings.catch_warnings():
    # Of the checker: what it misses in environments without a registry.
    warnings.simplefilter("ignore")
    env_checker.check_env(played, skip_render_check=True, skip_close_check=True)
  text, info = played.reset(seed=1)
  assert task["statement"] in text
  assert [t["function"]["name"] for t in info["tools"]] == [
    tool["name"] for tool in record["tools"]
  ]
  act = lambda name, arguments: played.step(
    {"name": name, "arguments": arguments}
  )
  observation, reward, terminated, truncated, info = act("no_tool", "{")
  assert observation.startswith("error: ") and info == {"is_error": True}
  assert (reward, terminated, truncated) == (0.0, False, False)
  answer = json.dumps({"answer_text": json.dumps(task["answer"])})
  observation, reward, terminated, truncated, info = act(
    "submit_result", answer
  )
  assert (reward, terminated, truncated) == (1.0, True, False)
  with pytest.raises(RuntimeError, match="done"):
    act("submit_result", answer)
  with pytest.raises(ValueError, match="needs name and arguments"):
    played.step({"name": "x"})
  with pytest.raises(ValueError, match="options"):
    played.reset(options={"x": 1})
  played.close()
  played.close()


def test_gymnasiums_wrappers_work_inside_a_running_loop():
  record, task = world.tasks("total")[0]
  answer = json.dumps({"answer_text": json.dumps(task["answer"])})

  async def play():
    inner = general.GeneralEnvironment(record, task)
    limited = gymnasium.wrappers.TimeLimit(
      gymnasium_api.GymnasiumEnvironment(inner), max_episode_steps=2
    )
    counted = gymnasium.wrappers.RecordEpisodeStatistics(limited)
    counted.reset()
    wrong = {"name": record["tools"][0]["name"], "arguments": "[]"}
    assert counted.step(wrong)[2:4] == (False, False)
    right = {"name": "submit_result", "arguments": answer}
    info = counted.step(right)[4]
    assert (info["episode"]["r"], info["episode"]["l"]) == (1.0, 2)
    counted.close()

  asyncio.run(play())
