"""Worker processes that may hang, crash or eat memory without harm.

A checker of answers runs code on text that a model wrote: sympy on a tower of
powers does not come back, and does not hear a signal either. Each worker is a
process; one that misses its deadline is killed and another takes its place.

A worker is a new Python that imports what its function needs and no more. What
multiprocessing spawns imports the program's own module first, and with it JAX
and the rest of a trainer: ten seconds where the scorer takes half a second.
Here that is done only for functions and items that the program itself defines.
"""

from collections.abc import Callable, Sequence
import dataclasses
import multiprocessing
from multiprocessing import connection
from multiprocessing import reduction
from multiprocessing import spawn
import pickletools
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any
import weakref

# Set while this process is a worker that imports its program.
_starting = threading.Event()

# How long a worker may take to import what its function needs.
_START_SECONDS = 120.0

# Of what multiprocessing tells a new process.
_PLACE = ("sys_argv", "orig_dir", "dir")
_PROGRAM = ("init_main_from_name", "init_main_from_path")


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
      ValueError: if a number is not positive, or no name leads to the function.
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
    try:
      self._with_program = _names_program(function)
    # Versions of Python raise one or the other for a function without a name.
    except Exception as error:
      raise ValueError(
        f"{function!r} reaches no new process: {error}"
      ) from None
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
    if not self._with_program and any(map(_names_program, items)):
      self._end_idle()
      self._with_program = True
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
    self._end_idle()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _end_idle(self):
    while self._idle:
      self._idle.pop().kill()

  def _start(self):
    return _Worker(self._function, self._memory, self._with_program)


class _Worker:
  """A process, its pipe, and when its present item must be done."""

  def __init__(self, function, memory_bytes, with_program):
    if _starting.is_set():
      raise RuntimeError(
        "a pool is used as its program is imported: guard what the program "
        'runs with `if __name__ == "__main__":`'
      )
    told = spawn.get_preparation_data("worker")
    self.pipe, other = multiprocessing.Pipe()
    self.process = subprocess.Popen(
      [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = {told['sys_path']!r}; "
        f"from {__name__} import serve; serve({other.fileno()})",
      ],
      stdin=subprocess.DEVNULL,
      pass_fds=[other.fileno()],
    )
    other.close()
    # Of a pool that nobody closed.
    weakref.finalize(self, _end, self.process)
    self.usable = True
    self.deadline = 0.0
    names = _PLACE + (_PROGRAM if with_program else ())
    place = {name: told[name] for name in names if name in told}
    try:
      self.pipe.send(place)
      self.pipe.send((function, memory_bytes))
      if not self.pipe.poll(_START_SECONDS):
        raise RuntimeError(f"a worker did not start in {_START_SECONDS} s")
      self.pipe.recv()
    except (EOFError, ConnectionError):
      self.kill()
      raise RuntimeError(
        f"a worker for {function!r} died as it started"
      ) from None
    except BaseException:
      self.kill()
      raise

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
        return Outcome(error=f"crash: exit code {self.process.returncode}")
    if time.monotonic() > self.deadline:
      self.kill()
      return Outcome(error=f"timeout after {self.timeout} s")
    return None

  def kill(self):
    self.usable = False
    _end(self.process)
    self.pipe.close()


def _end(process):
  process.kill()
  process.wait()


def _names_program(value) -> bool:
  """Whether only a process that has the program's module can read a value.

  A text that speaks of `__main__`, as programs do, is not enough.
  """
  data = bytes(reduction.ForkingPickler.dumps(value))
  return b"__main__" in data and any(
    argument == "__main__" for _, argument, _ in pickletools.genops(data)
  )


def _finished(busy):
  """Waits for the first workers to finish; yields them with their outcomes."""
  soonest = min(worker.deadline for worker in busy)
  left = max(soonest - time.monotonic(), 0.0) + 0.01
  connection.wait([worker.pipe for worker in busy], timeout=left)
  found = [(worker, worker.outcome()) for worker in busy]
  return [(worker, outcome) for worker, outcome in found if outcome is not None]


def serve(handle: int) -> None:
  """The life of a worker.

  Args:
    handle: file descriptor of its pipe, which tells it what to do.
  """
  # What stops the program's whole group (a scheduler's SIGTERM, Ctrl-C) is not
  # to cost the answers at hand their score: the pool ends its workers itself.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  pipe = connection.Connection(handle)
  _starting.set()
  spawn.prepare(pipe.recv())
  function, memory_bytes = pipe.recv()
  _starting.clear()
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
