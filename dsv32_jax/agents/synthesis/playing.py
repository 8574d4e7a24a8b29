"""Plays calls in an environment and keeps the conversation of them."""

from collections.abc import Mapping
import json
from typing import Any

from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol


class Player:
  """One episode of calls, as `chat.encode_messages` takes it.

  Attributes:
    messages: a system message with the tools, the user's, then calls and
      results.
  """

  def __init__(self, environment: protocol.Environment):
    """Takes an environment, which it neither resets before nor closes."""
    self.messages: list[dict[str, Any]] = []
    self._environment = environment

  async def begin(self) -> None:
    """Resets the environment."""
    start = await self._environment.reset()
    shown = tools.CallChecker(start.tools).descriptions()
    self.messages = [
      {"role": "system", "content": "", "tools": shown},
      {"role": "user", "content": start.observation},
    ]

  async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
    """Carries out a call and returns the observation."""
    step = await self._environment.step(
      protocol.ToolCall(name=name, arguments=arguments)
    )
    text = json.dumps(arguments, ensure_ascii=False)
    message = policies.call(name, text)
    del message["reasoning_content"]  # Nothing was thought.
    self.messages.append(message)
    self.messages.append({"role": "tool", "content": step.observation})
    return step.observation
