"""What a client may ask: the fields of the OpenAI API, with bounds.

Fields that are not known are errors, as are values of known ones that this
server cannot honour: nothing is left out in silence. None stands for a field
that is not given.
"""

import re
from typing import Annotated, Any, Literal

import pydantic

from dsv32_jax.generation import requests
from dsv32_jax.generation.server import schema_parts

MAX_STOPS = 16
MAX_CHOICES = 64
MAX_PROMPTS = 64
MAX_MESSAGES = 10_000
MAX_TOOLS = 128
MAX_BIASES = 1024


def _token_id(text: str) -> int:
  if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
    raise ValueError("a token's id has to be a decimal number")
  return int(text)


# JSON's keys are texts.
TokenId = Annotated[str, pydantic.AfterValidator(_token_id)]


class _Sampling(schema_parts.Strict):
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
  stream_options: schema_parts.StreamOptions | None = None
  user: str | None = None
  frequency_penalty: float | None = None
  presence_penalty: float | None = None
  logit_bias: (
    Annotated[dict[TokenId, float], pydantic.Field(max_length=MAX_BIASES)]
    | None
  ) = None

  @pydantic.model_validator(mode="after")
  def _check_stream(self):
    if self.stream_options is not None and not self.stream:
      raise ValueError("stream_options goes with stream")
    return self

  @property
  def num_top_logprobs(self) -> int:
    """How many of the likeliest tokens are told with each."""
    return 0

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
      for name in (
        *("temperature", "top_p", "top_k", "min_p", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "logit_bias"),
      )
      if getattr(self, name) is not None
    }
    return requests.SamplingParameters(
      max_tokens=max_tokens,
      top_logprobs=self.num_top_logprobs,
      stop=self.stops,
      seed=None if self.seed is None else self.seed + choice,
      **given,
    )


class ChatRequest(_Sampling):
  """The body of /v1/chat/completions."""

  messages: Annotated[
    list[schema_parts.Message],
    pydantic.Field(min_length=1, max_length=MAX_MESSAGES),
  ]
  max_completion_tokens: int | None = None
  tools: (
    Annotated[list[schema_parts.Tool], pydantic.Field(max_length=MAX_TOOLS)]
    | None
  ) = None
  tool_choice: (
    Literal["auto", "none", "required"] | schema_parts.ToolChoice | None
  ) = None
  parallel_tool_calls: bool | None = None
  response_format: schema_parts.ResponseFormat | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = None
  thinking: schema_parts.Thinking | None = None
  chat_template_kwargs: schema_parts.TemplateArguments | None = None
  store: Annotated[bool | None, schema_parts.only(False)] = None
  metadata: dict[str, str] | None = None

  @pydantic.model_validator(mode="after")
  def _check_once(self):
    both = (self.max_tokens, self.max_completion_tokens)
    if None not in both and both[0] != both[1]:
      raise ValueError("max_tokens and max_completion_tokens differ")
    if self.thinking is not None and self.chat_template_kwargs is not None:
      raise ValueError("thinking and chat_template_kwargs: give one")
    if self.top_logprobs and not self.logprobs:
      raise ValueError("top_logprobs goes with logprobs")
    return self

  @property
  def num_top_logprobs(self) -> int:
    return self.top_logprobs or 0

  @property
  def most_tokens(self) -> int | None:
    if self.max_tokens is None:
      return self.max_completion_tokens
    return self.max_tokens

  @property
  def active_tools(self) -> list[schema_parts.Tool]:
    """The tools that the model is shown."""
    return [] if self.tool_choice == "none" else self.tools or []

  @property
  def has_strict_tools(self) -> bool:
    """Whether arguments are held to the schema of a tool."""
    return any(tool.function.strict for tool in self.active_tools)

  @property
  def most_calls(self) -> int | None:
    """How many tools a reply calls at most; None: any number."""
    return 1 if self.parallel_tool_calls is False else None

  @property
  def strict_schema(self) -> dict[str, Any] | None:
    """What the reply is held to, or None."""
    match self.response_format:
      case schema_parts.ResponseFormat(type="json_object"):
        return {"type": "object"}
      case schema_parts.ResponseFormat(
        json_schema=schema_parts.JsonSchema(strict=True, schema_=schema)
      ):
        return schema
    return None

  @property
  def forced_names(self) -> list[str]:
    """Names of the tools of which one has to be called; none: no call has to.

    Raises:
      ValueError: there is no such tool.
    """
    names = [tool.function.name for tool in self.tools or []]
    if isinstance(self.tool_choice, schema_parts.ToolChoice):
      if self.tool_choice.function.name not in names:
        raise ValueError(
          f"tool_choice: {self.tool_choice.function.name!r} is not one of the"
          f" tools {names}"
        )
      return [self.tool_choice.function.name]
    if self.tool_choice == "required" and not names:
      raise ValueError("tool_choice: 'required' goes with tools")
    return names if self.tool_choice == "required" else []

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
  logprobs: int | None = None
  echo: Annotated[bool | None, schema_parts.only(False)] = None
  best_of: Annotated[int | None, schema_parts.only(1)] = None
  suffix: Annotated[str | None, schema_parts.only("")] = None

  @property
  def num_top_logprobs(self) -> int:
    return self.logprobs or 0

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
