"""Worker processes that may hang, crash or eat memory without harm.

A checker of answers runs code on text that a model wrote: sympy on a tower of
powers does not come back, and does not hear a signal either. Each worker is a
process; one that misses its deadline is killed and another takes its place.
"""

from collections.abc import Callable, Sequence
import dataclasses
import multiprocessing
from multiprocessing import connection
import resource
import signal
import time
from typing import Any
import weakref

# How long a worker may take to import what its function needs.
_START_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What became of one call.

  Attributes:
    value: what the function returned, or None.
    error: empty, or one line: "timeout ...", "crash ..." or the exception.
  """

  value: Any = None
  error: str = ""


class WorkerPool:
  """Processes that run one function on many items."""

  def __init__(
    self,
    function: Callable[[Any], Any],
    *,
    num_workers: int,
    timeout_seconds: float,
    memory_bytes: int | None = None,
  ):
    """Starts nothing yet; `map` starts workers as it needs them.

    Args:
      function: of one item; found by name from a new process.
      num_workers: processes at most.
      timeout_seconds: for one item.
      memory_bytes: address space of a worker at most, or None.

    Raises:
      ValueError: if a number is not positive.
    """
    for name, value in (
      ("num_workers", num_workers),
      ("timeout_seconds", timeout_seconds),
      ("memory_bytes", 1 if memory_bytes is None else memory_bytes),
    ):
      if not value > 0:
        raise ValueError(f"{name}={value} must be positive")
    self._function = function
    self._num_workers = num_workers
    self._timeout = timeout_seconds
    self._memory = memory_bytes
    self._idle: list[_Worker] = []
    self._closed = False

  def map(self, items: Sequence[Any]) -> list[Outcome]:
    """Runs the function on each item; one Outcome each, in order.

    Raises:
      ValueError: if the pool is closed.
      RuntimeError: if a worker does not even start.
    """
    if self._closed:
      raise ValueError("the pool is closed")
    outcomes: list[Outcome | None] = [None] * len(items)
    waiting = list(range(len(items)))[::-1]
    busy: dict[_Worker, int] = {}
    try:
      while waiting or busy:
        while waiting and len(busy) < self._num_workers:
          worker = self._idle.pop() if self._idle else self._start()
          index = waiting.pop()
          busy[worker] = index
          worker.send(items[index], self._timeout)
        for worker, outcome in _finished(busy):
          outcomes[busy.pop(worker)] = outcome
          if worker.usable:
            self._idle.append(worker)
    finally:
      for worker in busy:
        worker.kill()
    return outcomes

  def close(self) -> None:
    """Ends the workers."""
    self._closed = True
    while self._idle:
      self._idle.pop().kill()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _start(self):
    return _Worker(self._function, self._memory)


class _Worker:
  """A process, its pipe, and when its present item must be done."""

  def __init__(self, function, memory_bytes):
    # A fork would copy the locks of JAX's threads as they happen to be.
    context = multiprocessing.get_context("spawn")
    self.pipe, other = context.Pipe()
    self.process = context.Process(
      target=_serve, args=(other, function, memory_bytes), daemon=True
    )
    self.process.start()
    other.close()
    # Of a pool that nobody closed: what multiprocessing sends at the end of the
    # program is a SIGTERM, which a worker does not hear.
    weakref.finalize(self, self.process.kill)
    self.usable = True
    self.deadline = 0.0
    if not self.pipe.poll(_START_SECONDS):
      self.kill()
      raise RuntimeError(f"a worker did not start in {_START_SECONDS} s")
    try:
      self.pipe.recv()
    except EOFError:
      self.kill()
      raise RuntimeError(
        f"a worker for {function!r} died as it started"
      ) from None

  def send(self, item, timeout):
    self.deadline = time.monotonic() + timeout
    self.timeout = timeout
    try:
      self.pipe.send(item)
    except (BrokenPipeError, ConnectionResetError):
      # Its end is read as a crash.
      self.usable = False

  def outcome(self) -> Outcome | None:
    """What became of the item, or None while it runs."""
    if self.pipe.poll():
      try:
        return self.pipe.recv()
      except (EOFError, ConnectionResetError):
        self.kill()
        return Outcome(error=f"crash: exit code {self.process.exitcode}")
    if time.monotonic() > self.deadline:
      self.kill()
      return Outcome(error=f"timeout after {self.timeout} s")
    return None

  def kill(self):
    self.usable = False
    self.process.kill()
    self.process.join()
    self.pipe.close()


def _finished(busy):
  """Waits for the first workers to finish; yields them with their outcomes."""
  soonest = min(worker.deadline for worker in busy)
  left = max(soonest - time.monotonic(), 0.0) + 0.01
  connection.wait([worker.pipe for worker in busy], timeout=left)
  found = [(worker, worker.outcome()) for worker in busy]
  return [(worker, outcome) for worker, outcome in found if outcome is not None]


def _serve(pipe, function, memory_bytes):
  """The life of a worker."""
  # What stops the program's whole group (a scheduler's SIGTERM, Ctrl-C) is not
  # to cost the answers at hand their score: the pool ends its workers itself.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  if memory_bytes is not None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
  pipe.send("ready")
  while True:
    try:
      item = pipe.recv()
    except EOFError:
      return
    try:
      outcome = Outcome(value=function(item))
    except Exception as error:  # of the checker on a model's text: data
      text = str(error).split("\n")[0][:200]
      outcome = Outcome(error=f"{type(error).__name__}: {text}")
    pipe.send(outcome)
