"""A few short files, one of which is wrong: read, edit, test, submit.

Agentic coding small enough for a tiny model. Files are text in memory; tests
run what was edited, in a sandboxed process of its own. Hidden tests decide, on
the files as they are in the end; what they expect never enters the sandbox.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.sandbox import functions

_LOG = logging.getLogger(__name__)

MAX_STEPS = 20
MAX_CHARS = 2000
_FILE = {"type": "string", "minLength": 1}

TOOLS = (
  protocol.tool("open", "Shows a file.", {"file": _FILE}),
  protocol.tool(
    "edit",
    "Replaces a text, which the file must hold exactly once, by another.",
    {
      "file": _FILE,
      "old": {"type": "string", "minLength": 1},
      "new": {"type": "string"},
    },
  ),
  protocol.tool("run_tests", "Tells what the files get wrong.", {}),
  protocol.tool("submit", "Ends the work; hidden tests decide.", {}),
)
_CHECKER = tools.CallChecker(TOOLS)

Test = tuple[Sequence[int], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
  """A file with one function, which has the file's name without its ending.

  Attributes:
    name: of the function.
    text: of the file.
    tests: arguments and what the function is to return, that run_tests runs.
    returned: what it returns to each of them as the file is given.
    hidden: likewise tests, that decide.
    is_right: whether the file as it is given passes them.
  """

  name: str
  text: str
  tests: tuple[Test, ...]
  returned: tuple[int, ...]
  hidden: tuple[Test, ...]
  is_right: bool

  @property
  def file(self) -> str:
    return f"{self.name}.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepairTask:
  """Files to be put right."""

  id: str
  modules: tuple[Module, ...]


class RepairEnvironment(checked.CheckedEnvironment):
  """One task; see protocol.Environment."""

  def __init__(self, task: RepairTask, *, max_steps: int = MAX_STEPS):
    """Takes the task.

    Raises:
      ValueError: max_steps is less than 1.
      SandboxError: this machine offers no sandbox.
    """
    super().__init__(task.id, _CHECKER, max_steps)
    self.task = task
    self._functions = functions.shared()

  async def reset(self) -> protocol.Start:
    self.begin(files={one.file: one.text for one in self.task.modules})
    names = ", ".join(one.file for one in self.task.modules)
    return protocol.Start(
      observation=f"Mend {names}, then submit.", tools=TOOLS
    )

  async def verify(self) -> float:
    for module in self.task.modules:
      if not self._is_edited(module):
        if not module.is_right:
          return 0.0
      elif await self._failures(module, module.hidden):
        return 0.0
    return 1.0

  def snapshot(self) -> dict[str, Any]:
    state = {**self.state, "files": dict(self.state["files"])}
    return {"task": self.task.id, "state": state}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    self.check_snapshot(snapshot)
    state = snapshot["state"]
    self._state = {**state, "files": dict(state["files"])}

  async def close(self) -> None:
    """The sandbox is shared, so there is nothing to give back."""

  async def carry_out(self, call: protocol.ToolCall) -> str:
    if call.name == "submit":
      self.state["done"] = True
      return "The work is submitted."
    if call.name == "run_tests":
      return await self._run_tests()
    name, files = call.arguments["file"], self.state["files"]
    if name not in files:
      raise tools.ToolError("there is no such file")
    if call.name == "open":
      return files[name]
    files[name] = _edited(files[name], **call.arguments)
    return "done"

  async def _run_tests(self) -> str:
    told = []
    for module in self.task.modules:
      if self._is_edited(module):
        told += await self._failures(module, module.tests)
      else:
        told += _differences(module.name, module.tests, module.returned)
    return "\n".join(told) or "all tests pass"

  async def _failures(self, module, tests) -> list[str]:
    """What an edited file gets wrong, a line each."""
    outputs = await self._functions.call_async(
      self.state["files"][module.file],
      module.name,
      [case for case, _ in tests],
    )
    if outputs.ended:
      _LOG.warning("%s of %s: %s", module.file, self.task.id, outputs.error)
    if outputs.values is None:
      return [f"{module.name}: {outputs.error}"]
    return _differences(module.name, tests, outputs.values)

  def _is_edited(self, module) -> bool:
    return self.state["files"][module.file] != module.text


def _edited(text: str, *, file: str, old: str, new: str) -> str:
  del file
  if text.count(old) != 1:
    raise tools.ToolError(f"the file holds old {text.count(old)} times")
  text = text.replace(old, new)
  if len(text) > MAX_CHARS:
    raise tools.ToolError(f"the file would exceed {MAX_CHARS} characters")
  return text


def _differences(
  name: str, tests: Sequence[Test], values: Sequence[object]
) -> list[str]:
  """Tells where values, which untrusted code may have given, are wrong."""
  if len(values) != len(tests):
    return [f"{name}: {len(values)} answers to {len(tests)} calls"]
  return [
    f"{name}({', '.join(map(str, case))}) is {_shown(value)}, not {wanted}"
    for (case, wanted), value in zip(tests, values)
    if type(value) is not int or value != wanted
  ]


def _shown(value: object) -> str:
  """Shortens JSON; nested as it may be, no nesting is followed."""
  return (
    type(value).__name__
    if isinstance(value, list | dict)
    else (str(value)[:20])
  )
