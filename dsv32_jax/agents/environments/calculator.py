"""Arithmetic with a tool that does one step at a time."""

from collections.abc import Mapping
import dataclasses
import operator
import re
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol

MAX_STEPS = 20
# Beyond it a product of products would grow without end.
LARGEST = 10**12
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_STEP = re.compile(r"\s*(-?[0-9]{1,13})\s*([-+*])\s*(-?[0-9]{1,13})\s*")


TOOLS = (
  protocol.tool(
    "calculate",
    "Tells what two integers give, such as 3 * -4.",
    {"step": {"type": "string"}},
  ),
  protocol.tool(
    "submit",
    "Submits the answer and ends the task.",
    {"answer": {"type": "integer"}},
  ),
)
_CHECKER = tools.CallChecker(TOOLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalculatorTask:
  """A question and its answer, an integer."""

  id: str
  question: str
  answer: int


class CalculatorEnvironment(checked.CheckedEnvironment):
  """One question; see protocol.Environment."""

  def __init__(self, task: CalculatorTask, *, max_steps: int = MAX_STEPS):
    """Takes the question; ValueError if max_steps is less than 1."""
    super().__init__(task.id, _CHECKER, max_steps)
    self.task = task

  async def reset(self) -> protocol.Start:
    self.begin(answer=None)
    return protocol.Start(observation=self.task.question, tools=TOOLS)

  async def verify(self) -> float:
    return float(self.state["answer"] == self.task.answer)

  def snapshot(self) -> dict[str, Any]:
    return {"task": self.task.id, "state": dict(self.state)}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    self.check_snapshot(snapshot)
    self._state = dict(snapshot["state"])

  async def close(self) -> None:
    """Holds nothing."""

  async def carry_out(self, call: protocol.ToolCall) -> str:
    if call.name == "submit":
      self.state.update(done=True, answer=call.arguments["answer"])
      return "The answer is submitted."
    return result_of(call.arguments["step"])


def result_of(step: str) -> str:
  """Returns what a step gives.

  Raises:
    tools.ToolError: it is no step, or gives too much.
  """
  match = _STEP.fullmatch(step)
  if match is None:
    raise tools.ToolError(
      "the step must be two integers with +, - or * between them"
    )
  left, sign, right = match.groups()
  value = _SIGNS[sign](int(left), int(right))
  if abs(value) > LARGEST:
    raise tools.ToolError(f"the result is beyond {LARGEST}")
  return str(value)
