"""One reply: asks the runner, and gives out a stream or a whole."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import dataclasses
import json
import logging
import time
from typing import Any
import uuid

import fastapi
from fastapi import responses

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import requests as requests_lib
from dsv32_jax.generation.server import answers as answers_lib
from dsv32_jax.generation.server import chat_stream
from dsv32_jax.generation.server import errors
from dsv32_jax.generation.server import metrics as metrics_lib
from dsv32_jax.generation.server import replies
from dsv32_jax.generation.server import runner as runner_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is to be answered.

  Attributes:
    model: its name in the reply.
    requests: one for each choice.
    num_prompt_tokens: each prompt counted once.
    format: makes the objects of the reply.
    stops: strings that end a choice.
    new_chat: reads the text of a choice; None: it is content.
    must_call: whether a choice that ends without a tool call is an error.
    strict_calls: whether one whose calls are malformed is.
  """

  model: str
  requests: Sequence[requests_lib.Request]
  num_prompt_tokens: int
  format: replies.ChatFormat | replies.CompletionFormat
  stops: tuple[str, ...]
  new_chat: Callable[[], chat_stream.ChatStream] | None = None
  must_call: bool = False
  strict_calls: bool = False


class Reply:
  """The reply to one HTTP request."""

  def __init__(
    self,
    runner: runner_lib.Runner,
    tokenizer: tokenizers.Tokenizer,
    plan: Plan,
    metrics: metrics_lib.Metrics,
  ):
    self._plan, self._metrics = plan, metrics
    self._answers = answers_lib.Answers(runner)
    self._choices = [
      replies.Choice(tokenizer, plan.stops, plan.new_chat and plan.new_chat())
      for _ in plan.requests
    ]
    self._begun = time.monotonic()
    self._base = {
      "id": plan.format.prefix + uuid.uuid4().hex,
      "created": int(time.time()),
      "model": plan.model,
    }

  async def whole(self, request: fastapi.Request) -> responses.Response:
    """Waits for the end; a client that goes away ends it sooner."""
    with contextlib.closing(self):
      await self._submit()
      work = asyncio.ensure_future(self._collect())
      gone = asyncio.ensure_future(_disconnected(request))
      try:
        await asyncio.wait({work, gone}, return_when="FIRST_COMPLETED")
        if not work.done():
          # Nobody reads it.
          return responses.Response(status_code=499)
        return responses.JSONResponse(work.result())
      finally:
        for task in (work, gone):
          task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)

  async def stream(self, *, include_usage: bool) -> responses.Response:
    """Begins a stream; what is wrong with the request is raised before."""
    try:
      await self._submit()
    except BaseException:
      self.close()
      raise
    return _Stream(self, self._events(include_usage))

  def close(self) -> None:
    """Gives up what still runs; called at every end."""
    self._answers.close()
    for choice in self._choices:
      if choice.finish_reason is None:
        choice.finish_reason = "cancelled"
        self._metrics.ended.labels("cancelled").inc()

  async def _submit(self) -> None:
    try:
      await self._answers.submit(self._plan.requests)
    except ValueError as error:
      raise errors.ApiError(400, str(error)) from error

  async def _steps(self) -> AsyncIterator[tuple[int, replies.Step]]:
    first = True
    async for index, event in self._answers:
      if first and event.token_id is not None:
        seconds = time.monotonic() - self._begun
        self._metrics.first_token_seconds.observe(seconds)
        first = False
      choice = self._choices[index]
      step = choice.push(event)
      if step is None:
        continue
      if step.finish_reason is not None:
        self._metrics.ended.labels(step.finish_reason).inc()
        if event.finish_reason is None:
          # A stop string was seen here before the engine saw it.
          self._answers.cancel(index)
      if step.finish_reason in ("stop", "tool_calls"):
        self._require_kept(index, step.finish_reason)
      yield index, step

  def _require_kept(self, index: int, reason: str) -> None:
    """Raises where a choice has ended and is not what was asked for."""
    constraint = self._plan.requests[index].constraint
    failure = constraint and constraint.failure
    if self._plan.strict_calls and self._choices[index].is_malformed:
      failure = failure or "a value holds what ends it"
    if failure is not None:
      raise errors.ApiError(
        500,
        f"the reply could not be held to its schema: {failure}",
        code="schema_not_kept",
      )
    if self._plan.must_call and reason == "stop":
      raise errors.ApiError(
        500,
        "the model began the tool call that tool_choice asks for, but what it"
        " wrote is none",
        code="no_tool_call",
      )

  async def _collect(self) -> dict[str, Any]:
    steps: list[list[replies.Step]] = [[] for _ in self._choices]
    async for index, step in self._steps():
      steps[index].append(step)
    return {
      **self._base,
      "object": self._plan.format.kinds[0],
      "choices": [
        self._plan.format.whole(index, one) for index, one in enumerate(steps)
      ],
      "usage": self._usage(),
    }

  async def _events(self, include_usage: bool) -> AsyncIterator[bytes]:
    """Yields server-sent events."""
    extra = {"usage": None} if include_usage else {}
    base = {**self._base, "object": self._plan.format.kinds[1], **extra}
    try:
      for index in range(len(self._choices)):
        opening = self._plan.format.opening(index)
        if opening is not None:
          yield _event({**base, "choices": [opening]})
      async for index, step in self._steps():
        for chunk in self._plan.format.chunks(index, step):
          yield _event({**base, "choices": [chunk]})
      if include_usage:
        yield _event({**base, "choices": [], "usage": self._usage()})
      yield b"data: [DONE]\n\n"
    except Exception as error:  # the status is out: it is told in the stream
      told = errors.of(error)
      if told.status == 500:
        _log.error("a stream failed", exc_info=error)
      yield _event(told.body())

  def _usage(self) -> dict[str, int]:
    drawn = sum(choice.num_tokens for choice in self._choices)
    return replies.usage(self._plan.num_prompt_tokens, drawn)


class _Stream(responses.StreamingResponse):
  """Closes its reply however it ends, even before it has begun."""

  def __init__(self, reply: Reply, events: AsyncIterator[bytes]):
    super().__init__(
      events,
      media_type="text/event-stream",
      headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )
    self._reply = reply

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._reply.close()


def _event(value: dict[str, Any]) -> bytes:
  return b"data: " + json.dumps(value).encode() + b"\n\n"


async def _disconnected(request: fastapi.Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass
