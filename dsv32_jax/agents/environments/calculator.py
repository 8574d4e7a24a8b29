"""Arithmetic with a tool that does one step at a time."""

from collections.abc import Mapping
import dataclasses
import operator
import re
from typing import Any

from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol

MAX_STEPS = 20
# Beyond it a product of products would grow without end.
LARGEST = 10**12
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_STEP = re.compile(r"\s*(-?[0-9]{1,13})\s*([-+*])\s*(-?[0-9]{1,13})\s*")


def _tool(name, description, **properties):
  return protocol.ToolSchema(
    name=name,
    description=description,
    parameters={
      "type": "object",
      "properties": properties,
      "required": list(properties),
      "additionalProperties": False,
    },
  )


TOOLS = (
  _tool(
    "calculate",
    "Tells what two integers give, such as 3 * -4.",
    step={"type": "string"},
  ),
  _tool(
    "submit",
    "Submits the answer and ends the task.",
    answer={"type": "integer"},
  ),
)


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
    super().__init__(task, TOOLS, max_steps)

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
  """Returns what a step gives, or what is wrong with it."""
  match = _STEP.fullmatch(step)
  if match is None:
    return "error: the step must be two integers with +, - or * between them"
  left, sign, right = match.groups()
  value = _SIGNS[sign](int(left), int(right))
  return str(value) if abs(value) <= LARGEST else "error: it is too large"
