"""What environments share whose tools are checked here and wait elsewhere."""

from collections.abc import Mapping
from typing import Any

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol


class CheckedEnvironment:
  """Counts steps and checks calls; `carry_out` does what is left of them.

  Attributes:
    state: of the episode: `steps`, `done` and what a subclass adds in `begin`.
  """

  def __init__(self, task_id: str, checker: tools.CallChecker, max_steps: int):
    """Takes what an episode is checked by.

    Args:
      task_id: that snapshots are told by.
      checker: of the tools; making one takes longer than an episode's calls,
        so that environments share it.
      max_steps: after as many calls an episode is done.

    Raises:
      ValueError: max_steps is less than 1.
    """
    if max_steps < 1:
      raise ValueError(f"{max_steps=} must be at least 1")
    self._task_id = task_id
    self._max_steps = max_steps
    self._checker = checker
    self._state: dict[str, Any] | None = None

  @property
  def state(self) -> dict[str, Any]:
    if self._state is None:
      raise RuntimeError("no episode runs: call reset first")
    return self._state

  def begin(self, **state: Any) -> None:
    """Begins an episode."""
    self._state = {"steps": 0, "done": False, **state}

  async def step(self, call: protocol.ToolCall) -> protocol.Step:
    """Carries out a call; see protocol.Environment.step."""
    state = self.state
    if state["done"]:
      raise RuntimeError("the episode is done")
    state["steps"] += 1
    try:
      self._checker.check(call.name, call.arguments)
      text = await self.carry_out(call)
    except tools.ToolError as error:
      text = tools.observation_of_error(error)
    state["done"] = state["done"] or state["steps"] >= self._max_steps
    return protocol.Step(observation=text, done=state["done"])

  async def carry_out(self, call: protocol.ToolCall) -> str:
    """Does what a call of the right form asks; returns the observation.

    Raises:
      tools.ToolError: what the call asks cannot be done.
    """
    raise AssertionError(f"{type(self).__name__} has no tools")

  def check_snapshot(self, snapshot: Mapping[str, Any]) -> None:
    """Raises ValueError for the snapshot of another task."""
    if snapshot["task"] != self._task_id:
      raise ValueError(f"{snapshot['task']=} is not {self._task_id!r}")
