"""Where a model builds an environment: shell, search, tools, proposals.

The model fills a database with the shell (and what it finds with the search
tools, if there is a source), takes it as the environment's data, writes tools,
and proposes a task with its solution and verifier. Each proposal that passes
(see `proposals`) has to be beaten by the next in tool calls of its solution,
which is how difficulty is told; tools may be added at any time. Paper section
3.2.3.
"""

from collections.abc import Mapping
import dataclasses
import json
import keyword
import re
from typing import Any

from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.environments import search_index
from dsv32_jax.agents.environments import written
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.synthesis.general import programs
from dsv32_jax.agents.synthesis.general import proposals
from dsv32_jax.agents.synthesis.general import taken_rows
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import workshop_tools

MAX_STEPS = 400
MAX_TOOLS = 40
_NAME = re.compile(r"[a-z][a-z0-9_]{0,60}")
# Without a source and with one.
_CHECKERS = {
  False: tools.CallChecker(workshop_tools.SCHEMAS),
  True: tools.CallChecker((*workshop_tools.SCHEMAS, *workshop_tools.SEARCHING)),
}


@dataclasses.dataclass
class Work:
  """What a model has made so far.

  Attributes:
    rows: of the database, by table.
    tools: each with name, description, parameters and source.
    tasks: kept ones, each at its hardest level with its `history`.
    current: levels of the task that is being made harder.
    known_tools: names of those that were there when a task last passed.
    rejections: task number, level and reason of each refused proposal.
  """

  rows: dict[str, list[dict[str, Any]]] = dataclasses.field(
    default_factory=dict
  )
  tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  tasks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  current: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  known_tools: list[str] = dataclasses.field(default_factory=list)
  rejections: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def keep_current(self) -> None:
    """Moves the hardest level of the current task to the kept ones."""
    if self.current:
      steps = [level.pop("step") for level in self.current]
      self.tasks.append({**self.current[-1], "history": steps})
      self.current = []


class Workshop(checked.CheckedEnvironment):
  """One environment in the making; see protocol.Environment.

  It is played once: `restore` goes back to no earlier state.

  Attributes:
    work: what there is.
  """

  def __init__(
    self,
    category: str,
    box: sandbox.Sandbox,
    *,
    source: search_index.Source | None = None,
    most_tasks: int = 3,
    levels: int = 4,
  ):
    """Takes what is asked for.

    Args:
      category: of the environment, such as "trip planning".
      box: a sandbox in which Python is found (`workspace.sandbox`).
      source: that may be searched for data; None: no search.
      most_tasks: that are kept, and then it is done.
      levels: of difficulty, the simplest among them.
    """
    super().__init__(category, _CHECKERS[source is not None], MAX_STEPS)
    self.work = Work()
    self._category, self._box = category, box
    self._most_tasks, self._levels = most_tasks, levels
    self._folder = workspaces.Workspace(box=box, image=taken_rows.EMPTY_TREE)
    self._searching = None
    if source is not None:
      blank = {"id": category, "question": "", "answer": "-"}
      self._searching = search.SearchEnvironment(source, blank)
    self._functions = {
      "shell": self._shell,
      "take_database": self._take_database,
      "set_tool": self._set_tool,
      "try_tool": self._try_tool,
      "propose_task": self._propose_task,
      "next_task": self._next_task,
      "finish": self._finish,
    }

  async def reset(self) -> protocol.Start:
    self.work = Work()
    self.begin(delta=workspaces.Delta())
    shown = (
      *workshop_tools.SCHEMAS,
      *(workshop_tools.SEARCHING if self._searching else ()),
    )
    return protocol.Start(
      observation=workshop_tools.prompt(
        self._category, self._most_tasks, self._levels
      ),
      tools=shown,
    )

  async def verify(self) -> float:
    """Returns 1 if a task has passed."""
    self.work.keep_current()
    return float(bool(self.work.tasks))

  def snapshot(self) -> dict[str, Any]:
    return {"task": self._task_id, "work": dataclasses.asdict(self.work)}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    raise ValueError("a workshop is played once, from its beginning")

  async def close(self) -> None:
    """Has nothing to give back: no process outlives a call."""

  async def carry_out(self, call: protocol.ToolCall) -> str:
    if call.name in self._functions:
      return await self._functions[call.name](**call.arguments)
    return await self._searching.carry_out(call)

  async def _shell(self, command: str) -> str:
    values = await self._run(command)
    if values["code"]:
      return f"{values['output']}\n[exit code {values['code']}]"
    return values["output"]

  async def _run(self, command, **order):
    answer = await self._folder.run_async(
      {"operation": "shell", "commands": [command], **order},
      self.state["delta"],
    )
    if answer.delta is not None:
      self.state["delta"] = answer.delta
    if answer.error:
      raise tools.ToolError(answer.error)
    if answer.values["code"] is None:
      raise tools.ToolError(f"it took more than {self._folder.seconds:g} s")
    return answer.values

  async def _take_database(self, path: str) -> str:
    self._require_no_task("the data")
    values = await self._run(
      taken_rows.command(path),
      keep="nothing",
      characters=taken_rows.MAX_CHARACTERS,
    )
    if values["code"]:
      raise tools.ToolError(f"{path}: {values['output'].strip()[-300:]}")
    self.work.rows = taken_rows.check(values["output"])
    counts = {name: len(rows) for name, rows in self.work.rows.items()}
    return f"Taken; rows by table: {json.dumps(counts)}"

  async def _set_tool(self, name, description, parameters, source) -> str:
    self._require_rows()
    reserved = {*programs.BUILTINS, "query", "solve", written.SUBMIT.name}
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in reserved:
      raise tools.ToolError(
        f"{name!r} must be a name of lower-case letters, digits and _ that is"
        " not taken"
      )
    tool = {
      "name": name,
      "description": description,
      "parameters": parameters,
      "source": source,
    }
    others = [x for x in self.work.tools if x["name"] != name]
    if len(others) < len(self.work.tools):
      self._require_no_task(f"the tool {name}")
    if len(others) >= MAX_TOOLS:
      raise tools.ToolError(f"there are {MAX_TOOLS} tools, which is enough")
    if not description.strip() or parameters.get("type") != "object":
      raise tools.ToolError("a tool needs a description, and an object's type")
    try:
      proposals.check_schema(parameters)
      tools.CallChecker(written.schemas([tool]))
    except (tasks.Rejection, ValueError) as error:
      raise tools.ToolError(str(error)) from error
    # Whether its source can be run at all.
    world = written.WrittenWorld(self._box, self.work.rows, [tool])
    try:
      await world.solve("def solve():\n  return 0\n")
    finally:
      world.close()
    self.work.tools = [*others, tool]
    return f"The environment has {len(self.work.tools)} tools."

  async def _try_tool(self, name: str, arguments: dict[str, Any]) -> str:
    checker = tools.CallChecker(written.schemas(self.work.tools))
    checker.check(name, arguments)
    world = written.WrittenWorld(self._box, self.work.rows, self.work.tools)
    try:
      value = await world.call_tool(name, arguments)
    finally:
      world.close()
    text = json.dumps(value, ensure_ascii=False)
    return tools.clip(text, tools.ToolLimits().result_chars)

  async def _propose_task(self, **fields) -> str:
    self._require_rows()
    work = self.work
    level = len(work.current) + 1
    if level > self._levels:
      raise tools.ToolError(f"{self._levels} levels are enough: next_task")
    past = work.current[-1]["solution_calls"] if work.current else 0
    try:
      found = await proposals.judge(
        self._box,
        work.rows,
        work.tools,
        proposals.Proposal(**fields),
        past + 1,
      )
      if any(found["statement"] == x["statement"] for x in work.tasks):
        raise tasks.Rejection("it equals another task")
    except tasks.Rejection as rejection:
      work.rejections.append(
        {"task": len(work.tasks), "level": level, "reason": str(rejection)}
      )
      raise tools.ToolError(f"the task does not pass: {rejection}") from None
    names = [tool["name"] for tool in work.tools]
    step = {
      "level": level,
      "solution_calls": found["solution_calls"],
      "added_tools": [n for n in names if n not in work.known_tools],
    }
    work.known_tools = names
    work.current.append({**found, "level": level, "step": step})
    return (
      f"The task passes at level {level} of {self._levels}, its solution makes"
      f" {found['solution_calls']} tool calls."
    )

  async def _next_task(self) -> str:
    if not self.work.current:
      raise tools.ToolError("no version of the current task has passed")
    self.work.keep_current()
    if len(self.work.tasks) >= self._most_tasks:
      self.state["done"] = True
    return f"{len(self.work.tasks)} tasks are kept."

  async def _finish(self) -> str:
    self.state["done"] = True
    return "The work is done."

  def _require_rows(self):
    if not self.work.rows:
      raise tools.ToolError("there is no data yet: take_database comes first")

  def _require_no_task(self, what):
    if self.work.current or self.work.tasks:
      raise tools.ToolError(f"{what} cannot change any more: a task uses it")
