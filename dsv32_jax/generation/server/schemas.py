"""What a client may ask: the fields of the OpenAI API, with bounds.

Fields that are not known are errors, as are values of known ones that this
server cannot honour: nothing is left out in silence. None stands for a field
that is not given.
"""

from typing import Annotated, Any, Literal

import pydantic

from dsv32_jax.generation import requests

MAX_STOPS = 16
MAX_CHOICES = 64
MAX_PROMPTS = 64
MAX_MESSAGES = 10_000
MAX_TOOLS = 128


def _only(*allowed):
  """Makes a check that a value is one of these or None."""

  def check(value):
    if value is not None and value not in allowed:
      shown = " or ".join(repr(one) for one in allowed)
      raise ValueError(f"this server supports only {shown}")
    return value

  return pydantic.AfterValidator(check)


class _Strict(pydantic.BaseModel):
  """No conversions, no further fields, no infinities."""

  model_config = pydantic.ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False
  )


class TextPart(_Strict):
  """A part of a message's content; there are no others than text."""

  type: Literal["text"]
  text: str


class Function(_Strict):
  """What a call calls; arguments is the text of a JSON object."""

  name: str
  arguments: str


class ToolCall(_Strict):
  """A call of an earlier reply."""

  id: str
  type: Literal["function"] = "function"
  function: Function
  index: int | None = None


Nothing = Annotated[Any, _only((), [], {})]


class Message(_Strict):
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


class ToolFunction(_Strict):
  """A function that the model may call; see `agents.tools`."""

  name: str
  description: str = ""
  parameters: dict[str, Any] | None = None
  strict: Annotated[bool | None, _only(False)] = None


class Tool(_Strict):
  """A tool; there are no others than functions."""

  type: Literal["function"]
  function: ToolFunction


class JsonSchema(_Strict):
  """A schema of the reply; name and description are not shown."""

  name: str
  description: str | None = None
  schema_: dict[str, Any] = pydantic.Field(alias="schema")
  strict: Annotated[bool | None, _only(False)] = None


class ResponseFormat(_Strict):
  """A schema is shown to the model; nothing forces it to keep to it."""

  type: Annotated[str, _only("text", "json_schema")]
  json_schema: JsonSchema | None = None

  @pydantic.model_validator(mode="after")
  def _check(self):
    if (self.type == "json_schema") != (self.json_schema is not None):
      raise ValueError("json_schema goes with type 'json_schema'")
    return self


class StreamOptions(_Strict):
  """Whether a stream ends with its token counts."""

  include_usage: bool = False
  include_obfuscation: Annotated[bool | None, _only(False)] = None


class Thinking(_Strict):
  """As in DeepSeek's own API."""

  type: Literal["enabled", "disabled"]


class TemplateArguments(_Strict):
  """As other servers of this model have it."""

  thinking: bool


class _Sampling(_Strict):
  """How to draw, whatever the prompt is; see `requests.SamplingParameters`."""

  model: str
  max_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None
  min_p: float | None = None
  n: Annotated[int, pydantic.Field(ge=1, le=MAX_CHOICES)] | None = None
  seed: int | None = None
  stop: (
    Annotated[str, pydantic.Field(max_length=256)]
    | Annotated[
      list[Annotated[str, pydantic.Field(max_length=256)]],
      pydantic.Field(max_length=MAX_STOPS),
    ]
    | None
  ) = None
  ignore_eos: bool | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None
  frequency_penalty: Annotated[float | None, _only(0)] = None
  presence_penalty: Annotated[float | None, _only(0)] = None
  logit_bias: Annotated[dict[str, float] | None, _only({})] = None

  @pydantic.model_validator(mode="after")
  def _check_stream(self):
    if self.stream_options is not None and not self.stream:
      raise ValueError("stream_options goes with stream")
    return self

  @property
  def include_usage(self) -> bool:
    return self.stream_options is not None and self.stream_options.include_usage

  @property
  def stops(self) -> tuple[str, ...]:
    if isinstance(self.stop, str):
      return (self.stop,)
    return tuple(self.stop or ())

  def sampling(
    self, max_tokens: int, choice: int
  ) -> requests.SamplingParameters:
    """Returns how to draw one of the choices.

    Args:
      max_tokens: of the choice.
      choice: its number; with a seed, each draws from its own.

    Raises:
      ValueError: naming the field.
    """
    given = {
      name: getattr(self, name)
      for name in ("temperature", "top_p", "top_k", "min_p", "ignore_eos")
      if getattr(self, name) is not None
    }
    return requests.SamplingParameters(
      max_tokens=max_tokens,
      stop=self.stops,
      seed=None if self.seed is None else self.seed + choice,
      **given,
    )


class ChatRequest(_Sampling):
  """The body of /v1/chat/completions."""

  messages: Annotated[
    list[Message], pydantic.Field(min_length=1, max_length=MAX_MESSAGES)
  ]
  max_completion_tokens: int | None = None
  tools: Annotated[list[Tool], pydantic.Field(max_length=MAX_TOOLS)] | None = (
    None
  )
  tool_choice: Annotated[Any, _only("auto", "none")] = None
  parallel_tool_calls: Annotated[bool | None, _only(True)] = None
  response_format: ResponseFormat | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int | None, _only(0)] = None
  thinking: Thinking | None = None
  chat_template_kwargs: TemplateArguments | None = None
  store: Annotated[bool | None, _only(False)] = None
  metadata: dict[str, str] | None = None

  @pydantic.model_validator(mode="after")
  def _check_once(self):
    both = (self.max_tokens, self.max_completion_tokens)
    if None not in both and both[0] != both[1]:
      raise ValueError("max_tokens and max_completion_tokens differ")
    if self.thinking is not None and self.chat_template_kwargs is not None:
      raise ValueError("thinking and chat_template_kwargs: give one")
    return self

  @property
  def most_tokens(self) -> int | None:
    if self.max_tokens is None:
      return self.max_completion_tokens
    return self.max_tokens

  @property
  def active_tools(self) -> list[Tool]:
    """The tools that the model is shown."""
    return [] if self.tool_choice == "none" else self.tools or []

  def is_thinking(self, default: bool) -> bool:
    if self.thinking is not None:
      return self.thinking.type == "enabled"
    if self.chat_template_kwargs is not None:
      return self.chat_template_kwargs.thinking
    return default


TokenIds = list[int]


class CompletionRequest(_Sampling):
  """The body of /v1/completions.

  A prompt of text is text, whatever it spells; it begins with bos unless
  add_special_tokens is false. Other special tokens are given as token ids.
  """

  prompt: str | list[str] | TokenIds | list[TokenIds]
  add_special_tokens: bool | None = None
  logprobs: Annotated[int | None, _only(0)] = None
  echo: Annotated[bool | None, _only(False)] = None
  best_of: Annotated[int | None, _only(1)] = None
  suffix: Annotated[str | None, _only("")] = None

  @property
  def prompts(self) -> list[str | TokenIds]:
    """One or more prompts.

    Raises:
      ValueError: none, or too many together with n.
    """
    many = isinstance(self.prompt, list) and (
      not self.prompt or not isinstance(self.prompt[0], int)
    )
    prompts = self.prompt if many else [self.prompt]
    if not prompts:
      raise ValueError("prompt: there is none")
    if len(prompts) > MAX_PROMPTS or len(prompts) * (self.n or 1) > MAX_CHOICES:
      raise ValueError(
        f"prompt: {len(prompts)} prompts and n={self.n or 1} are more than"
        f" {MAX_CHOICES} choices"
      )
    return prompts
