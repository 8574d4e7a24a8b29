"""Requests of a coroutine, answered by a runner's thread."""

import asyncio
from collections.abc import AsyncIterator, Sequence
import dataclasses
import functools
import uuid

from dsv32_jax.generation import requests as requests_lib
from dsv32_jax.generation.server import runner as runner_lib


class EngineError(RuntimeError):
  """The engine failed while a request ran; the cause is what it raised."""


class Answers:
  """Events of some requests in the order in which they come.

  Whoever opens it closes it, and whatever then still runs is cancelled:

      with Answers(runner) as answers:
        await answers.submit(requests)
        async for index, event in answers:
          ...
  """

  def __init__(self, runner: runner_lib.Runner):
    self._runner = runner
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue = asyncio.Queue()
    self._live: dict[str, int] = {}

  def __enter__(self) -> "Answers":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  async def submit(self, requests: Sequence[requests_lib.Request]) -> None:
    """Asks for requests; their ids are made here, whatever they bring.

    Raises:
      ValueError: the engine takes one of them not.
      runner.NotAcceptingError: the runner takes none.
    """
    for index, request in enumerate(requests):
      name = uuid.uuid4().hex
      # Known before it is asked for: giving up meanwhile cancels it as well.
      self._live[name] = index
      await asyncio.wrap_future(
        self._runner.submit(
          dataclasses.replace(request, request_id=name),
          functools.partial(self._deliver, index),
        )
      )

  async def __aiter__(
    self,
  ) -> AsyncIterator[tuple[int, requests_lib.TokenEvent]]:
    """Yields (place of the request, event) until all requests have ended.

    Raises:
      EngineError: the engine has failed.
      runner.NotAcceptingError: the runner has given up.
    """
    while self._live:
      index, event = await self._events.get()
      if isinstance(event, runner_lib.NotAcceptingError):
        raise event
      if isinstance(event, Exception):
        raise EngineError("the engine has failed") from event
      if event.finish_reason is not None:
        del self._live[event.request_id]
      yield index, event

  def cancel(self, index: int) -> None:
    """Ends a request, if it still runs; its last event says so."""
    for name, other in self._live.items():
      if other == index:
        self._runner.cancel(name)

  def close(self) -> None:
    """Cancels what still runs."""
    for name in self._live:
      self._runner.cancel(name)
    self._live.clear()

  def _deliver(self, index, event) -> None:
    """Runs in the runner's thread; raises where the loop is closed."""
    self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


async def complete(
  runner: runner_lib.Runner, request: requests_lib.Request
) -> requests_lib.Completion:
  """Runs one request to its end; cancelling the call gives it up.

  Raises:
    ValueError, runner.NotAcceptingError, EngineError: as of `Answers`.
  """
  with Answers(runner) as answers:
    await answers.submit([request])
    events = [event async for _, event in answers]
  return requests_lib.collect(events[-1].request_id, request, events)
