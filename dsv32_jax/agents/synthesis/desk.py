"""Where a model hands in what it made: an environment with one last tool.

What is handed in is checked; where it does not pass, the model is told why and
may go on, and the reason is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol


class Desk(checked.CheckedEnvironment):
  """See protocol.Environment; a subclass has `check`, and `help` for the rest.

  Attributes:
    handed_in: what passed, as `check` returned it; None before.
    refusals: why others did not pass.
  """

  def __init__(
    self,
    name: str,
    prompt: str,
    schemas: Sequence[protocol.ToolSchema],
    checker: tools.CallChecker,
    max_steps: int,
  ):
    """Takes the tools, of which the last hands in.

    Args:
      name: of what is made.
      prompt: the user's message.
      schemas: of all tools.
      checker: of them.
      max_steps: after as many calls an episode is done.
    """
    super().__init__(name, checker, max_steps)
    self.handed_in: Any = None
    self.refusals: list[str] = []
    self._prompt, self._schemas = prompt, schemas

  async def reset(self) -> protocol.Start:
    self.handed_in, self.refusals = None, []
    self.begin()
    return protocol.Start(observation=self._prompt, tools=self._schemas)

  async def verify(self) -> float:
    """Returns 1 if something passed."""
    return float(self.handed_in is not None)

  def snapshot(self) -> dict[str, Any]:
    return {"task": self._task_id, "state": dict(self.state)}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    raise ValueError("what is made at a desk is made once, from the beginning")

  async def close(self) -> None:
    """Has nothing to give back."""

  async def carry_out(self, call: protocol.ToolCall) -> str:
    if call.name != self._schemas[-1].name:
      return await self.help(call)
    try:
      self.handed_in = await self.check(**call.arguments)
    except tools.ToolError as error:
      self.refusals.append(str(error))
      raise
    self.state["done"] = True
    return "It is handed in."

  async def check(self, **arguments: Any) -> Any:
    """Returns what is handed in; tools.ToolError where it does not pass."""
    raise AssertionError(f"{type(self).__name__} takes nothing: {arguments}")

  async def help(self, call: protocol.ToolCall) -> str:
    """Carries out a call of another tool."""
    raise AssertionError(f"{type(self).__name__} has one tool, not {call.name}")
