"""The environment of a code task: a repository, a shell, an editor, tests.

Each call works on the tree that the one before left, in a sandbox of its own
(see `repository.workspace`). Hidden tests and the known solution never enter a
sandbox that an agent's commands run in; they are placed for grading alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.repository import workspace as workspaces

MAX_STEPS = 500
_PATH = {"type": "string", "minLength": 1}
_LINE = {"type": "integer", "minimum": 1}


TOOLS = (
  protocol.tool(
    "shell",
    "Runs a command line with bash in the repository and returns what it"
    " prints. Files stay as it leaves them; processes do not outlive it. There"
    " is no network.",
    {"command": {"type": "string"}},
  ),
  protocol.tool(
    "view",
    "Shows the numbered lines of a file, from first_line to last_line if they"
    " are given, or the names in a folder.",
    {"path": _PATH, "first_line": _LINE, "last_line": _LINE},
    ["path"],
  ),
  protocol.tool(
    "edit",
    "Replaces old_text, which the file must hold exactly once, by new_text."
    " With an empty old_text it makes a new file.",
    {
      "path": _PATH,
      "old_text": {"type": "string"},
      "new_text": {"type": "string"},
    },
  ),
  protocol.tool(
    "run_tests",
    "Runs the test files named with the repository's test runner and returns"
    " its output.",
    {"files": {"type": "array", "items": _PATH, "minItems": 1}},
  ),
  protocol.tool("submit", "Ends the work; hidden tests decide.", {}),
)
_CHECKER = tools.CallChecker(TOOLS)


class CodeEnvironment(checked.CheckedEnvironment):
  """One task on a repository; see protocol.Environment.

  Attributes:
    task: what is to be done.
    last_grade: of the last `verify`, with the reason of its reward.
  """

  def __init__(
    self,
    task: grading.CodeTask,
    workspace: workspaces.Workspace,
    *,
    max_steps: int = MAX_STEPS,
  ):
    """Takes the built tree of the task's commit.

    Args:
      task: what is to be done.
      workspace: of the image that `build` made; many environments share it.
        A call takes up to its `seconds`, a verification as much for each batch
        of tests: an episode's `environment_seconds` has to allow for it.
      max_steps: after as many calls an episode is done.

    Raises:
      ValueError: max_steps is less than 1.
    """
    super().__init__(task.id, _CHECKER, max_steps)
    self.task = task
    self.last_grade: grading.Grade | None = None
    self._workspace = workspace

  async def reset(self) -> protocol.Start:
    self.begin(delta=workspaces.Delta())
    return protocol.Start(observation=prompt(self.task), tools=TOOLS)

  async def verify(self) -> float:
    """Grades the tree as it is now, submitted or not."""
    self.last_grade = await grading.grade_async(
      self.task, self._workspace, self.state["delta"]
    )
    return self.last_grade.reward

  def snapshot(self) -> dict[str, Any]:
    delta = self.state["delta"].dump()
    return {"task": self.task.id, "state": {**self.state, "delta": delta}}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    self.check_snapshot(snapshot)
    state = snapshot["state"]
    delta = workspaces.Delta.load(state["delta"])
    self._state = {**state, "delta": delta}

  async def close(self) -> None:
    """Has nothing to give back: no process outlives a step."""

  async def carry_out(self, call: protocol.ToolCall) -> str:
    if call.name == "submit":
      self.state["done"] = True
      return "The work is submitted."
    # The report of a task's own runner is of no interest here.
    command = self.task.runner or languages.find(self.task.language).shown
    answer = await self._workspace.run_async(
      order_of(call.name, call.arguments, command), self.state["delta"]
    )
    if answer.delta is not None:
      self.state["delta"] = answer.delta
    return observation_of(call.name, answer, self._workspace.seconds)


def observation_of(name: str, answer: workspaces.Answer, seconds: float) -> str:
  """Returns what a model is told of a call of TOOLS.

  Args:
    name: of the tool.
    answer: of the workspace.
    seconds: that a command may take.
  """
  if answer.error:
    return f"error: {answer.error}"
  values, notes = answer.values, []
  if name in ("shell", "run_tests"):
    code = values["code"]
    if code is None:
      notes.append(f"[It took more than {seconds:g} s and was ended.]")
    elif code:
      notes.append(f"[exit code {code}]")
  return "\n".join([values["output"].rstrip("\n"), *notes]).lstrip("\n")


def prompt(task: grading.CodeTask) -> str:
  """Returns the user's message of a task."""
  return (
    "The current folder holds a repository in which this is to be done:\n\n"
    f"{task.statement}\n\n"
    "Change the sources so that it is, and call submit then. Hidden tests"
    " decide; changes of test files and of the test runner's settings do not"
    " count."
  )


def build(
  task: grading.CodeTask, workspace: workspaces.Workspace
) -> workspaces.Workspace:
  """Builds the tree that an agent begins with.

  Runs the task's setup, then makes the tree a git repository of one commit.

  Args:
    task: what is to be done.
    workspace: whose image is the bare tree of the task's commit.

  Returns:
    A workspace with the built tree as its image.

  Raises:
    ValueError: a command of the setup fails; the message ends with its output.
  """
  return build_tree(task.setup, workspace)


def build_tree(
  setup: tuple[str, ...], workspace: workspaces.Workspace
) -> workspaces.Workspace:
  """Is `build` before there is a task."""
  answer = workspace.run(
    {
      "operation": "shell",
      "commands": [*setup, _COMMIT],
      "keep": "everything",
    }
  )
  told = answer.error or " ".join(answer.values["output"].split())[-300:]
  if answer.error or answer.values["code"] != 0:
    raise ValueError(f"the build fails: {told}")
  return workspaces.Workspace(
    box=workspace.box,
    image=answer.archive,
    limits=workspace.limits,
    seconds=workspace.seconds,
    characters=workspace.characters,
  )


_COMMIT = (
  "git init -q -b main . && git add -A -f . && git -c user.name=base"
  " -c user.email=base@localhost -c commit.gpgsign=false commit -q"
  " --allow-empty -m 'The tree as it is given' && git gc -q"
)


def order_of(
  name: str, arguments: Mapping[str, Any], command: Sequence[str]
) -> dict[str, Any]:
  """Returns what a workspace is to do for a call of TOOLS.

  Args:
    name: of the tool.
    arguments: that fit its schema.
    command: that runs tests.
  """
  match name:
    case "shell":
      return {"operation": "shell", "commands": [arguments["command"]]}
    case "view":
      return {
        "operation": "view",
        "keep": "nothing",
        "path": arguments["path"],
        "first": arguments.get("first_line", 1),
        "last": arguments.get("last_line", 0),
      }
    case "edit":
      return {
        "operation": "edit",
        "path": arguments["path"],
        "old": arguments["old_text"],
        "new": arguments["new_text"],
      }
  return {
    "operation": "test",
    "command": list(command),
    "files": list(arguments["files"]),
  }
