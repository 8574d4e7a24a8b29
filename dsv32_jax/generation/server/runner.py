"""Steps an engine in one thread; any other thread may ask of it."""

from collections.abc import Callable
from concurrent import futures
import logging
import queue
import threading

from dsv32_jax.generation import requests as requests_lib

_log = logging.getLogger(__name__)
_DRAINING = "the server is shutting down"

# Given each event of a request, or the failure that ended it; called in the
# runner's thread, so it must only hand the value on.
Deliver = Callable[[requests_lib.TokenEvent | Exception], None]


def _drop(event) -> None:
  """Stands in for a receiver that has failed."""


class NotAcceptingError(RuntimeError):
  """The runner drains, has failed, or holds as many requests as it may."""


class BusyError(NotAcceptingError):
  """The runner holds as many requests as it may; that passes."""


class Runner:
  """Owns an engine's thread.

  Attributes:
    failure: what the engine raised in a step, or None; it serves no more.
  """

  def __init__(self, engine, *, max_requests: int):
    """Starts the thread.

    Args:
      engine: with `submit`, `step`, `cancel` and `has_work`.
      max_requests: live at once, queued ones included.

    Raises:
      ValueError: max_requests is not positive.
    """
    if max_requests < 1:
      raise ValueError(f"{max_requests=} must be positive")
    self.failure: Exception | None = None
    self._engine, self._max_requests = engine, max_requests
    self._calls: queue.SimpleQueue = queue.SimpleQueue()
    self._live: dict[str, Deliver] = {}
    # Those of them that are cancelled and whose last event is to come.
    self._leaving: set[str] = set()
    self._lock = threading.Lock()
    self._draining = False
    self._thread = threading.Thread(
      target=self._run, name="engine", daemon=True
    )
    self._thread.start()

  def submit(
    self, request: requests_lib.Request, deliver: Deliver
  ) -> futures.Future:
    """Asks for a request.

    Returns:
      A future of the request's id; it raises the engine's ValueError, and
      BusyError.

    Raises:
      NotAcceptingError: the runner drains or has failed.
    """
    return self._ask(lambda: self._submit(request, deliver))

  def cancel(self, request_id: str) -> None:
    """Ends a request, if it still runs; its pages are free soon after."""
    try:
      self._ask(lambda: self._cancel(request_id))
    except NotAcceptingError:
      with self._lock:
        if self._thread.is_alive():
          self._calls.put((futures.Future(), lambda: self._cancel(request_id)))

  @property
  def is_accepting(self) -> bool:
    """Whether it neither drains nor has failed."""
    return not self._draining

  def stats(self) -> dict[str, int]:
    """The engine's counts, read beside its thread: of about now."""
    return self._engine.stats()

  def drain(self, timeout_s: float | None = None) -> bool:
    """Takes no more requests and waits for those that run.

    Returns:
      Whether all have ended.
    """
    with self._lock:
      if not self._draining:
        self._draining = True
        self._calls.put((futures.Future(), lambda: None))
    self._thread.join(timeout_s)
    return not self._thread.is_alive()

  def give_up(self) -> None:
    """Takes no more requests, and ends those that run with an error."""
    with self._lock:
      self._draining = True
      if self._thread.is_alive():
        self._calls.put((futures.Future(), self._give_up))

  def _ask(self, call) -> futures.Future:
    answer = futures.Future()
    with self._lock:
      if self._draining:
        raise NotAcceptingError(_DRAINING)
      self._calls.put((answer, call))
    return answer

  def _submit(self, request, deliver):
    live = len(self._live) - len(self._leaving)
    if live >= self._max_requests:
      raise BusyError(f"{live} requests are live")
    request_id = self._engine.submit(request)
    self._live[request_id] = deliver
    return request_id

  def _cancel(self, request_id):
    if request_id in self._live and request_id not in self._leaving:
      self._engine.cancel(request_id)
      self._leaving.add(request_id)

  def _run(self):
    while True:
      # Sleeps only where nothing runs and nothing was asked.
      idle = not self._engine.has_work
      if idle and self._draining and self._calls.empty():
        return
      self._answer(wait=idle)
      try:
        events = self._engine.step() if self._engine.has_work else []
      except Exception as error:
        self._fail(error)
        return
      failed = {e.request_id for e in events if not self._deliver(e)}
      # Not before all is delivered: the last event may be among them.
      for request_id in failed & self._live.keys():
        self._cancel(request_id)
        self._live[request_id] = _drop

  def _deliver(self, event) -> bool:
    """Hands an event on; returns whether its receiver took it."""
    deliver = self._live.get(event.request_id, _drop)
    if event.finish_reason is not None:
      self._live.pop(event.request_id, None)
      self._leaving.discard(event.request_id)
    try:
      deliver(event)
    except Exception:  # of the receiver: no other request is to suffer
      _log.exception("%s: its receiver failed", event.request_id)
      return False
    return True

  def _answer(self, wait: bool):
    while wait or not self._calls.empty():
      answer, call = self._calls.get()
      wait = False
      # Whoever asked may have given up.
      if not answer.set_running_or_notify_cancel():
        continue
      try:
        answer.set_result(call())
      except Exception as error:  # told to whoever asked
        answer.set_exception(error)

  def _fail(self, error: Exception):
    with self._lock:
      self.failure, self._draining = error, True
    while not self._calls.empty():
      answer, _ = self._calls.get()
      if answer.set_running_or_notify_cancel():
        answer.set_exception(NotAcceptingError("the engine has failed"))
    self._tell_all(error)
    self._live.clear()

  def _give_up(self):
    self._tell_all(NotAcceptingError(_DRAINING))
    for request_id in self._live:
      self._cancel(request_id)
      self._live[request_id] = _drop

  def _tell_all(self, error: Exception):
    for request_id, deliver in self._live.items():
      try:
        deliver(error)
      except Exception:  # of the receiver: the others are still to be told
        _log.exception("%s: its receiver failed", request_id)
