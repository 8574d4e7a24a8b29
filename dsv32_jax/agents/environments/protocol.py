"""What every environment is, whatever its family.

An episode is reset, steps until one is done, verify, close. The methods that
may wait are coroutines, so one thread runs many episodes. What a policy did
wrong (an unknown tool, arguments of the wrong type, an answer that is no JSON)
is an observation or a reward of 0, never an exception.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolSchema:
  """What a policy is told about a tool.

  Attributes:
    name: of the function.
    description: what it returns, one sentence or two.
    parameters: JSON schema of its arguments, of type object.
  """

  name: str
  description: str
  parameters: Mapping[str, Any]


def tool(
  name: str,
  description: str,
  properties: Mapping[str, Any],
  required: Sequence[str] | None = None,
) -> ToolSchema:
  """Returns a tool of these parameters and no others.

  Args:
    name: of the tool.
    description: of the tool.
    properties: JSON schema of each parameter.
    required: names; None: all of them.
  """
  parameters = {
    "type": "object",
    "properties": dict(properties),
    "required": list(properties if required is None else required),
    "additionalProperties": False,
  }
  return ToolSchema(name=name, description=description, parameters=parameters)


def signatures(schemas: Sequence[ToolSchema]) -> str:
  """Describes tools by names and arguments alone, a line each.

  For models with a small window, in the place of the format's description.
  """
  return "\n".join(
    f"{schema.name}({', '.join(schema.parameters.get('properties', {}))})"
    for schema in schemas
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
  """A call as a policy makes it; nothing about it is trusted."""

  name: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """What an episode begins with: the user's message and the tools."""

  observation: str
  tools: Sequence[ToolSchema]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What a call led to; after `done` no further step may follow."""

  observation: str
  done: bool


class Environment(Protocol):
  """One task that can be tried any number of times."""

  async def reset(self) -> Start:
    """Begins an episode anew; whatever an earlier one did is forgotten."""

  async def step(self, call: ToolCall) -> Step:
    """Carries out a call.

    Raises:
      RuntimeError: if no episode runs.
    """

  async def verify(self) -> float:
    """Returns the reward of the episode so far, 0 to 1."""

  def snapshot(self) -> dict[str, Any]:
    """Returns the episode's state as JSON-able values."""

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    """Puts the episode back to where `snapshot` was taken.

    Raises:
      ValueError: if the snapshot is of another environment.
    """

  async def close(self) -> None:
    """Gives back what the environment holds; doing it twice is allowed."""
