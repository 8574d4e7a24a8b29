"""Any environment as a `gymnasium.Env`; needs the gymnasium extra.

Observations are texts, actions are tool calls: {"name": text, "arguments": JSON
text}. The reward of a step is 0 until the episode is done, then what the
environment says. What is wrong with an action is an observation.
"""

import asyncio
from collections.abc import Mapping
import threading
from typing import Any

import gymnasium

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol


class AnyText(gymnasium.Space[str]):
  """All texts; `gymnasium.spaces.Text` has those over a given alphabet."""

  def __init__(self):
    super().__init__(shape=None, dtype=str)

  @property
  def is_np_flattenable(self) -> bool:
    return False

  def contains(self, x: Any) -> bool:
    return isinstance(x, str)

  def sample(self, mask=None, probability=None) -> str:
    """Returns one of a few texts: no text is a typical one."""
    del mask, probability
    return ("", "{}", "submit_result")[int(self.np_random.integers(3))]

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, AnyText)

  __hash__ = None


class GymnasiumEnvironment(gymnasium.Env):
  """Plays an environment step by step, without an event loop of the caller.

  Attributes:
    observation_space: texts.
    action_space: tool calls.
    environment: what is played.
  """

  def __init__(self, environment: protocol.Environment):
    """Takes the environment, which `close` closes."""
    self.environment = environment
    self.observation_space = AnyText()
    self.action_space = gymnasium.spaces.Dict(
      {"name": AnyText(), "arguments": AnyText()}
    )
    self._checker: tools.CallChecker | None = None
    # A loop of its own: the caller may run inside another.
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()

  def reset(
    self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
  ) -> tuple[str, dict[str, Any]]:
    """Begins an episode anew.

    Args:
      seed: of the sampling of spaces; the environment itself draws nothing.
      options: none are known.

    Returns:
      The user's message, and {"tools": descriptions as the chat format has
      them}.

    Raises:
      ValueError: an option is given.
    """
    if options:
      raise ValueError(f"{options=} must be empty")
    super().reset(seed=seed)
    start = self._wait(self.environment.reset())
    self._checker = tools.CallChecker(start.tools)
    return start.observation, {"tools": self._checker.descriptions()}

  def step(
    self, action: Mapping[str, str]
  ) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """Carries out a call.

    Args:
      action: {"name", "arguments"}, text both.

    Returns:
      What it led to; the reward, 0.0 before the end; whether the episode is
      done; False; {"is_error": whether the action was no call at all}.

    Raises:
      ValueError: the action is none of the action space.
      RuntimeError: no episode runs.
    """
    if not self.action_space.contains(dict(action)):
      raise ValueError(f"{action=} needs name and arguments, both text")
    if self._checker is None:
      raise RuntimeError("no episode runs: call reset first")
    name, text = action["name"], action["arguments"]
    try:
      arguments = self._checker.arguments(name, text)
    except tools.ToolError as error:
      told = tools.observation_of_error(error)
      return told, 0.0, False, False, {"is_error": True}
    call = protocol.ToolCall(name=name, arguments=arguments)
    step = self._wait(self.environment.step(call))
    reward = self._wait(self.environment.verify()) if step.done else 0.0
    return step.observation, reward, step.done, False, {"is_error": False}

  def close(self) -> None:
    """Closes the environment and ends the loop; doing it twice is allowed."""
    if self._loop.is_closed():
      return
    try:
      self._wait(self.environment.close())
    finally:
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join()
      self._loop.close()

  def _wait(self, coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
