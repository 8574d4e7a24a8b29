"""The environment of a code-interpreter task: a question and a Jupyter kernel.

The paper's agents have at most 20 executions of 120 seconds each (appendix B).
Only the answer submitted counts; what cells print is for the model alone.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any

from dsv32_jax.agents import interpreter as interpreters
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol

MAX_STEPS = 100
# Longer ones are no answer to any question here.
MAX_ANSWER_CHARACTERS = 1000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
TOOLS = (
  protocol.tool(
    "python",
    "Runs Python code in a Jupyter kernel, whose variables stay, and returns"
    " what it prints and the value of its last line. There is no network.",
    {"code": {"type": "string"}},
  ),
  protocol.tool(
    "submit_result",
    "Submits the answer and ends the work.",
    {"answer_text": {"type": "string"}},
  ),
)
_CHECKER = tools.CallChecker(TOOLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpreterTask:
  """A question that code answers.

  Attributes:
    id: of the task.
    kind: of question.
    statement: what is asked, the form of the answer included.
    files: in the kernel's folder at the start, name to text.
    answer: the truth, as text.
    tolerance: of a number, relative to the truth; 0: text that is equal but
      for white space.
  """

  id: str
  kind: str
  statement: str
  answer: str
  files: dict[str, str] = dataclasses.field(default_factory=dict)
  tolerance: float = 0.0

  def __post_init__(self):
    if not 0 <= self.tolerance < 1:
      raise ValueError(f"tolerance={self.tolerance} must be in [0, 1)")
    if not accepts(self, self.answer):
      raise ValueError(
        f"task {self.id}: answer={self.answer!r:.99} is no answer"
      )


def accepts(task: InterpreterTask, text: str) -> bool:
  """Tells if an answer, which a model wrote, is right."""
  if len(text) > MAX_ANSWER_CHARACTERS:
    return False
  if task.tolerance == 0:
    return "".join(text.split()) == "".join(task.answer.split()) != ""
  if not _NUMBER.fullmatch(text.strip()):
    return False
  given, wanted = float(text), float(task.answer)
  return math.isfinite(given) and math.isclose(
    given, wanted, rel_tol=task.tolerance, abs_tol=1e-12
  )


class InterpreterEnvironment(checked.CheckedEnvironment):
  """One question with a kernel of its own; see protocol.Environment."""

  def __init__(
    self,
    task: InterpreterTask,
    make_interpreter: Callable[[dict[str, str]], interpreters.Interpreter],
    *,
    max_steps: int = MAX_STEPS,
  ):
    """Takes the question; nothing is started yet.

    Args:
      task: the question.
      make_interpreter: gives an interpreter whose folder holds these files.
      max_steps: after as many calls an episode is done.

    Raises:
      ValueError: max_steps is less than 1.
    """
    super().__init__(task.id, _CHECKER, max_steps)
    self.task = task
    self._make_interpreter = make_interpreter
    self._interpreter: interpreters.Interpreter | None = None

  async def reset(self) -> protocol.Start:
    self._renew()
    self.begin(answer=None, cells=[])
    return protocol.Start(observation=self.task.statement, tools=TOOLS)

  async def verify(self) -> float:
    text = self.state["answer"]
    return float(text is not None and accepts(self.task, text))

  def snapshot(self) -> dict[str, Any]:
    """Returns the state; of the kernel, the cells that led to its own."""
    cells = list(self.state["cells"])
    return {"task": self.task.id, "state": {**self.state, "cells": cells}}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    """Runs the cells of the snapshot again, in a new kernel.

    What they drew at random or read from a clock comes out anew.

    Raises:
      ValueError: the snapshot is of another task.
    """
    self.check_snapshot(snapshot)
    self._renew()
    state = snapshot["state"]
    self._state = {**state, "cells": list(state["cells"])}
    for cell in state["cells"]:
      await self._interpreter.execute_async(cell)

  async def close(self) -> None:
    if self._interpreter is not None:
      self._interpreter.close()
      self._interpreter = None

  async def carry_out(self, call: protocol.ToolCall) -> str:
    state = self.state
    if call.name == "submit_result":
      state |= {"done": True, "answer": call.arguments["answer_text"]}
      return "The answer is submitted."
    code = call.arguments["code"]
    cell = await self._interpreter.execute_async(code)
    if cell.status != "refused":
      state["cells"].append(code)
    return cell.observation() or "[The cell printed nothing.]"

  def _renew(self):
    if self._interpreter is not None:
      self._interpreter.close()
    self._interpreter = self._make_interpreter(self.task.files)
