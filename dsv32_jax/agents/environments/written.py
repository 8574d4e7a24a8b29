"""The environment of a general task whose tools and verifier a model wrote.

Nothing of it runs in this process. The tools have one sandboxed process that
lasts for an episode; the verifier has another, which holds the database and no
tool, so that whatever a call does to the one cannot reach the other. Both are
made from the environment's rows, and no query of either writes.
"""

from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
from typing import Any

from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import programs

SUBMIT = protocol.tool(
  "submit_result",
  "Submits the final answer as JSON text and ends the task.",
  {"answer_text": {"type": "string"}},
)
# Inside, no module of this project can be found.
_PROGRAM = """import sys, types
package, read_only = types.ModuleType("package"), types.ModuleType("read_only")
package.read_only = read_only
sys.modules["dsv32_jax.agents.environments"] = package
exec({read_only!r}, read_only.__dict__)
{tools}
"""
_NO_SUBMISSION = object()


@functools.cache
def _program() -> str:
  here = pathlib.Path(__file__)
  return _PROGRAM.format(
    read_only=here.with_name("read_only.py").read_text(),
    tools=here.with_name("written_tools.py").read_text(),
  )


def limits() -> sandbox.Limits:
  """Returns limits that a query over some thousands of rows fits in."""
  return sandbox.Limits(
    cpu_seconds=None, memory_bytes=512 << 20, processes=8, disk_bytes=16 << 20
  )


class WrittenWorld:
  """Rows with tools, and the process that runs what was written for them."""

  def __init__(
    self,
    box: sandbox.Sandbox,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    written: Sequence[Mapping[str, Any]] = (),
  ):
    """Takes the data; the first call starts the process.

    Args:
      box: where it runs.
      rows: by table.
      written: tools, each with `name` and `source`.
    """
    world = {
      "rows": rows,
      "tools": [{k: tool[k] for k in ("name", "source")} for tool in written],
      "builtins": list(programs.BUILTINS),
    }
    files = {"world.json": json.dumps(world)}
    self._worker = sandbox.Worker(box, _program(), limits=limits(), files=files)

  async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Any:
    """Returns what a tool answers; tools.ToolError where it does not."""
    return await self._ask("call_tool", name=name, arguments=arguments)

  async def solve(self, source: str) -> tuple[Any, list[tuple[str, Any]]]:
    """Runs a checked solution.

    Returns:
      Its answer, and the calls it made as (tool, arguments).

    Raises:
      tools.ToolError: it raised, took too long or gave no JSON.
    """
    match await self._ask("solve", source=source):
      case {"answer": answer, "calls": list(calls)}:
        return answer, [(name, arguments) for name, arguments in calls]
    raise tools.ToolError("the solution's process gave no answer")

  async def verify(self, source: str, answers: Sequence[Any]) -> list[bool]:
    """Returns what a checked verifier says of answers; ToolError as above."""
    found = await self._ask("verify", source=source, answers=list(answers))
    if not isinstance(found, list) or len(found) != len(answers):
      raise tools.ToolError("the verifier's process gave no answer")
    return [value is True for value in found]

  def close(self) -> None:
    """Ends the process; a later call would start another."""
    self._worker.close()

  async def _ask(self, function, **arguments):
    reply = await self._worker.call_async(function, arguments)
    if reply.error:
      raise tools.ToolError(reply.error)
    return reply.value


class WrittenEnvironment(checked.CheckedEnvironment):
  """One task of a written environment; see protocol.Environment."""

  def __init__(
    self,
    record: Mapping[str, Any],
    task: Mapping[str, Any],
    box: sandbox.Sandbox,
    *,
    max_steps: int = general.MAX_STEPS,
  ):
    """Takes a record; nothing is started yet.

    Args:
      record: `rows` by table; `tools`, each with `name`, `description`,
        `parameters` and `source`.
      task: `id`, `statement`, `answer_schema` and `verifier`.
      box: where its programs run.
      max_steps: after as many calls an episode is done.

    Raises:
      ValueError: max_steps is less than 1, or a schema is none.
    """
    self._schemas = (*schemas(record["tools"]), SUBMIT)
    super().__init__(task["id"], tools.CallChecker(self._schemas), max_steps)
    programs.check(task["verifier"], "verify", 1, ("query",))
    self.task = task
    self._tools = WrittenWorld(box, record["rows"], record["tools"])
    self._judge = WrittenWorld(box, record["rows"])
    self._answer_checker = general.answer_checker(task["answer_schema"])

  async def reset(self) -> protocol.Start:
    # A tool may keep what it likes between calls, but not between episodes.
    self._tools.close()
    self.begin(answer=None, calls=[])
    return protocol.Start(
      observation=general.prompt(self.task), tools=self._schemas
    )

  async def carry_out(self, call: protocol.ToolCall) -> str:
    arguments = dict(call.arguments)
    if call.name == SUBMIT.name:
      self.state.update(done=True, answer=arguments["answer_text"])
      return "The answer is submitted."
    self.state["calls"].append([call.name, arguments])
    value = await self._tools.call_tool(call.name, arguments)
    text = json.dumps(value, ensure_ascii=False)
    return tools.clip(text, tools.ToolLimits().result_chars)

  async def verify(self) -> float:
    """Returns 1 if the submitted answer fits its schema and is right."""
    answer = self._submitted()
    if answer is _NO_SUBMISSION:
      return 0.0
    try:
      (is_right,) = await self._judge.verify(self.task["verifier"], [answer])
    except tools.ToolError:  # of what it was given
      return 0.0
    return float(is_right)

  def snapshot(self) -> dict[str, Any]:
    """Returns the state; of the tools, the calls that led to their own."""
    calls = list(self.state["calls"])
    return {"task": self.task["id"], "state": {**self.state, "calls": calls}}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    """Makes the calls of the snapshot again, in a new process.

    Raises:
      ValueError: the snapshot is of another task.
    """
    self.check_snapshot(snapshot)
    self._tools.close()
    state = snapshot["state"]
    self._state = {**state, "calls": list(state["calls"])}
    for name, arguments in state["calls"]:
      try:
        await self._tools.call_tool(name, arguments)
      except tools.ToolError:
        continue  # as it did before

  async def close(self) -> None:
    self._tools.close()
    self._judge.close()

  def _submitted(self):
    text = self.state["answer"]
    if text is None:
      return _NO_SUBMISSION
    try:
      answer = general.parse_answer(text)
      self._answer_checker.check("answer", {"answer": answer})
    except (ValueError, tools.ToolError):
      return _NO_SUBMISSION
    return answer


def schemas(
  written: Sequence[Mapping[str, Any]],
) -> list[protocol.ToolSchema]:
  """Returns what an agent is told about written tools."""
  shown = ("name", "description", "parameters")
  return [
    protocol.ToolSchema(**{name: tool[name] for name in shown})
    for tool in written
  ]
