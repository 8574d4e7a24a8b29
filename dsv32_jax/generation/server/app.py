"""The OpenAI-compatible application over an engine's runner.

Paths: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.
A client that goes away takes its requests with it; the application's end waits
for those that run.
"""

import asyncio
import contextlib
import dataclasses
import time
from typing import Annotated

import fastapi
from fastapi import responses
import prometheus_client
import pydantic

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import chat_stream
from dsv32_jax.generation.server import constraints
from dsv32_jax.generation.server import errors
from dsv32_jax.generation.server import gate
from dsv32_jax.generation.server import metrics as metrics_lib
from dsv32_jax.generation.server import prompts
from dsv32_jax.generation.server import replies
from dsv32_jax.generation.server import runner as runner_lib
from dsv32_jax.generation.server import schemas
from dsv32_jax.generation.server import serving


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
  """What a server tells of itself and what it lets in.

  Attributes:
    model_name: that requests have to give.
    max_length: tokens of prompt and answer together at most.
    thinking: whether a chat that does not say so begins with thinking.
    api_keys: of which one has to be given; none: no key is needed.
    max_body_bytes: of a request.
    body_seconds: until a request's body is there.
    max_held_bytes: of the bodies of all requests that are not answered.
    drain_seconds: that the end waits for requests that run.
  """

  model_name: str
  max_length: int
  thinking: bool = False
  api_keys: tuple[str, ...] = ()
  max_body_bytes: int = 8 * 2**20
  body_seconds: float = 60.0
  max_held_bytes: int = 256 * 2**20
  drain_seconds: float = 60.0

  def __post_init__(self):
    if not self.model_name:
      raise ValueError(f"{self.model_name=} is empty")
    for name in (
      "max_length",
      "max_body_bytes",
      "body_seconds",
      "drain_seconds",
    ):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if self.max_held_bytes < self.max_body_bytes:
      raise ValueError(
        f"max_held_bytes={self.max_held_bytes} is below"
        f" max_body_bytes={self.max_body_bytes}"
      )
    for key in self.api_keys:
      if not key.isascii() or not key.isprintable() or not key.strip():
        raise ValueError("an API key is not of printable ASCII characters")


def make_app(
  runner: runner_lib.Runner,
  tokenizer: tokenizers.Tokenizer,
  config: ServerConfig,
  grammars: constraints.Grammars | None = None,
):
  """Makes the ASGI application; its end drains the runner.

  Args:
    runner: of an engine with this tokenizer's eos and decode.
    tokenizer: of the model.
    config: names and limits.
    grammars: keep to strict schemas; None: those are refused.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app):
    del app
    yield
    await asyncio.to_thread(runner.drain, config.drain_seconds)

  app = fastapi.FastAPI(
    title=config.model_name, docs_url=None, redoc_url=None, lifespan=lifespan
  )
  errors.install(app)
  metrics = metrics_lib.Metrics(runner)
  server = _Server(runner, tokenizer, config, metrics, grammars)
  _route(app, "/v1/chat/completions", schemas.ChatRequest, server.chat)
  _route(app, "/v1/completions", schemas.CompletionRequest, server.completion)
  app.get("/v1/models")(server.models)
  app.get("/v1/models/{name:path}")(server.model)
  app.get("/health")(server.health)
  app.get("/metrics")(server.metrics)
  return metrics.measured(
    gate.Gate(
      app,
      api_keys=config.api_keys,
      max_body_bytes=config.max_body_bytes,
      body_seconds=config.body_seconds,
      max_held_bytes=config.max_held_bytes,
    )
  )


def _route(app, path: str, schema: type[pydantic.BaseModel], answer) -> None:
  """Reads bodies here: strictly, and with errors of the API's form."""

  async def endpoint(request: fastapi.Request):
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
      raise errors.ApiError(
        400, f"content-type is {kind!r}, not 'application/json'"
      )
    body = await request.body()
    # A large one would hold up all others.
    parsed = await asyncio.to_thread(_parse, schema, body)
    return await answer(request, parsed)

  content = {"application/json": {"schema": schema.model_json_schema()}}
  app.post(path, openapi_extra={"requestBody": {"content": content}})(endpoint)


def _parse(schema: type[pydantic.BaseModel], body: bytes):
  try:
    return schema.model_validate_json(body)
  except pydantic.ValidationError as error:
    raise errors.of(error) from error


class _Server:
  """The endpoints."""

  def __init__(self, runner, tokenizer, config, metrics, grammars):
    self._runner, self._tokenizer = runner, tokenizer
    self._config, self._metrics = config, metrics
    self._grammars = grammars
    self._created = int(time.time())

  async def chat(self, request: fastapi.Request, body: schemas.ChatRequest):
    """Answers /v1/chat/completions."""
    self._check_model(body.model)
    thinking = body.is_thinking(self._config.thinking)
    prompt_ids = await _told(
      prompts.chat_ids, self._tokenizer, body, thinking=thinking
    )
    new_constraint = await _told(
      constraints.maker,
      body,
      self._tokenizer,
      self._grammars,
      thinking=thinking,
    )
    plan = serving.Plan(
      model=body.model,
      requests=self._requests(
        prompt_ids, body, body.most_tokens, new_constraint
      ),
      num_prompt_tokens=len(prompt_ids),
      format=replies.ChatFormat(self._tokenizer, bool(body.logprobs)),
      stops=body.stops,
      new_chat=lambda: chat_stream.ChatStream(
        thinking=thinking,
        with_tools=bool(body.active_tools),
        most_calls=body.most_calls,
      ),
      must_call=bool(body.forced_names),
      strict_calls=body.has_strict_tools,
    )
    return await self._answer(request, body, plan)

  async def completion(
    self, request: fastapi.Request, body: schemas.CompletionRequest
  ):
    """Answers /v1/completions."""
    self._check_model(body.model)
    many = [
      await _told(
        prompts.completion_ids,
        self._tokenizer,
        prompt,
        with_bos=body.add_special_tokens is not False,
      )
      for prompt in await _told(lambda: body.prompts)
    ]
    # As the API has it.
    most = 16 if body.max_tokens is None else body.max_tokens
    plan = serving.Plan(
      model=body.model,
      requests=[
        one
        for prompt_ids in many
        for one in self._requests(prompt_ids, body, most)
      ],
      num_prompt_tokens=sum(map(len, many)),
      format=replies.CompletionFormat(
        self._tokenizer, body.logprobs is not None
      ),
      stops=body.stops,
    )
    return await self._answer(request, body, plan)

  async def _answer(self, request, body, plan: serving.Plan):
    one = serving.Reply(self._runner, self._tokenizer, plan, self._metrics)
    if body.stream:
      return await one.stream(include_usage=body.include_usage)
    return await one.whole(request)

  def _requests(
    self, prompt_ids, body, most, new_constraint=lambda: None
  ) -> list[requests.Request]:
    room = self._config.max_length - len(prompt_ids)
    if room < 1 or (most is not None and most > room):
      raise errors.ApiError(
        400,
        f"{len(prompt_ids)} tokens of the prompt and"
        f" {1 if most is None else most} of the answer exceed the"
        f" {self._config.max_length} of the context",
        code="context_length_exceeded",
      )
    try:
      return [
        requests.Request(
          prompt_ids=prompt_ids,
          sampling=body.sampling(room if most is None else most, choice),
          constraint=new_constraint(),
        )
        for choice in range(body.n or 1)
      ]
    except ValueError as error:
      raise errors.ApiError(400, str(error)) from error

  def _check_model(self, name: str) -> None:
    if name != self._config.model_name:
      raise errors.ApiError(
        404,
        f"no model {name!r}; this server has {self._config.model_name!r}",
        param="model",
        code="model_not_found",
      )

  async def models(self):
    """Answers /v1/models."""
    return {"object": "list", "data": [self._card()]}

  async def model(self, name: Annotated[str, fastapi.Path()]):
    """Answers /v1/models/NAME."""
    self._check_model(name)
    return self._card()

  def _card(self):
    return {
      "id": self._config.model_name,
      "object": "model",
      "created": self._created,
      "owned_by": "local",
      "max_model_len": self._config.max_length,
    }

  async def health(self):
    """Answers /health: 200, or 503 where no request would be taken."""
    if self._runner.failure is not None:
      return responses.JSONResponse({"status": "failed"}, 503)
    if not self._runner.is_accepting:
      return responses.JSONResponse({"status": "draining"}, 503)
    return {"status": "ok"}

  async def metrics(self):
    """Answers /metrics."""
    return responses.Response(
      self._metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST
    )


async def _told(function, *args, **kwargs):
  """Calls a function beside the event loop; its ValueError is the client's."""
  try:
    return await asyncio.to_thread(function, *args, **kwargs)
  except ValueError as error:
    raise errors.ApiError(400, str(error)) from error
