"""What requests consist of: messages, tools, formats; see `schemas`."""

from typing import Annotated, Any, Literal

import pydantic


def only(*allowed):
  """Makes a check that a value is one of these or None."""

  def check(value):
    if value is not None and value not in allowed:
      shown = " or ".join(repr(one) for one in allowed)
      raise ValueError(f"this server supports only {shown}")
    return value

  return pydantic.AfterValidator(check)


class Strict(pydantic.BaseModel):
  """No conversions, no further fields, no infinities."""

  model_config = pydantic.ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False
  )


class TextPart(Strict):
  """A part of a message's content; there are no others than text."""

  type: Literal["text"]
  text: str


class Function(Strict):
  """What a call calls; arguments is the text of a JSON object."""

  name: str
  arguments: str


class ToolCall(Strict):
  """A call of an earlier reply."""

  id: str
  type: Literal["function"] = "function"
  function: Function
  index: int | None = None


Nothing = Annotated[Any, only((), [], {})]


class Message(Strict):
  """One message of a chat, of any role.

  What only other models have (refusal, audio, ...) may be there, but empty: a
  reply comes back as the client's library holds it.
  """

  role: Literal["system", "developer", "user", "assistant", "tool"]
  content: str | list[TextPart] | None = None
  name: str | None = None
  reasoning_content: str | None = None
  tool_calls: list[ToolCall] | None = None
  tool_call_id: str | None = None
  refusal: Nothing = None
  annotations: Nothing = None
  audio: Nothing = None
  function_call: Nothing = None

  @property
  def text(self) -> str | None:
    """The content, its parts joined."""
    if isinstance(self.content, list):
      return "".join(part.text for part in self.content)
    return self.content


class ToolFunction(Strict):
  """A function that the model may call; see `agents.tools`.

  Arguments of a strict one keep to its parameters.
  """

  name: str
  description: str = ""
  parameters: dict[str, Any] | None = None
  strict: bool | None = None


class Tool(Strict):
  """A tool; there are no others than functions."""

  type: Literal["function"]
  function: ToolFunction


class JsonSchema(Strict):
  """A schema of the reply; name and description are not shown."""

  name: str
  description: str | None = None
  schema_: dict[str, Any] = pydantic.Field(alias="schema")
  strict: bool | None = None


class ResponseFormat(Strict):
  """A schema is shown to the model; only if strict is the reply held to it.

  A reply of type json_object is held to being an object.
  """

  type: Annotated[str, only("text", "json_object", "json_schema")]
  json_schema: JsonSchema | None = None

  @pydantic.model_validator(mode="after")
  def _check(self):
    if (self.type == "json_schema") != (self.json_schema is not None):
      raise ValueError("json_schema goes with type 'json_schema'")
    return self


class StreamOptions(Strict):
  """Whether a stream ends with its token counts."""

  include_usage: bool = False
  include_obfuscation: Annotated[bool | None, only(False)] = None


class Thinking(Strict):
  """As in DeepSeek's own API."""

  type: Literal["enabled", "disabled"]


class TemplateArguments(Strict):
  """As other servers of this model have it."""

  thinking: bool


class FunctionName(Strict):
  """Which function."""

  name: str


class ToolChoice(Strict):
  """The tool that has to be called."""

  type: Literal["function"]
  function: FunctionName
