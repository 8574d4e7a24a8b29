"""A process that stays: functions that a model wrote, called many times."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import run

# For the interpreter to start and the module to be executed.
_START_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """What became of one call; all of it is the word of untrusted code.

  Attributes:
    value: JSON that the function returned; None where there is an error.
    error: empty, or one line: the exception, or why there is no answer.
    reason: "exit" where the process answered; else what ended it, one of
      limits.REASONS, and the next call meets a new process.
  """

  value: Any = None
  error: str = ""
  reason: str = "exit"


class Connection:
  """A sandboxed program that speaks JSON frames over a socket it inherits.

  A frame is 4 bytes of length, big-endian, and as many of JSON. No frame of
  more than `output_bytes` is read; what is not JSON, or names NaN, ends the
  program. Its stdout and stderr go nowhere.
  """

  def __init__(
    self,
    box: run.Sandbox,
    argv: Sequence[str],
    *,
    limits: limits_lib.Limits,
    files: Mapping[str, str | bytes] | None = None,
    unix_sockets: bool = False,
  ):
    """Starts argv with the number of the socket's descriptor behind it."""
    self._limits = limits
    self._socket, other = socket.socketpair()
    try:
      with other:
        self._running = box.start(
          [*argv, str(other.fileno())],
          limits=limits,
          files=files,
          unix_sockets=unix_sockets,
          pass_fds=[other.fileno()],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL,
          stderr=subprocess.DEVNULL,
        )
    except BaseException:
      self._socket.close()
      raise

  def close(self) -> None:
    """Ends every process of the sandbox."""
    self._socket.close()
    self._running.stop()

  def exchange(
    self, content, seconds: float, cancelled: threading.Event | None = None
  ) -> tuple[Any, str]:
    """Sends one frame and returns (the next one, "exit").

    Where none comes, returns (None, reason), and the program is to be closed;
    reason "exit" with None then is a program that ended or spoke nonsense.
    """
    text = _encoded(content)
    begin = time.monotonic()
    self._deadline = begin + seconds
    self._next_poll = begin + run.POLL_SECONDS
    self._cancelled = cancelled or threading.Event()
    try:
      view = memoryview(len(text).to_bytes(4, "big") + text)
      while view:
        view = view[self._step(self._socket.send, view) :]
      size = int.from_bytes(self._receive(4), "big")
      if size > self._limits.output_bytes:
        return None, "output"
      answer = self._receive(size)
      return json.loads(answer, parse_constant=_refuse), "exit"
    except _OverError as over:
      return None, over.reason
    except (OSError, ValueError, RecursionError):
      return None, self._running.how_it_ended()

  def _receive(self, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
      part = self._step(self._socket.recv, size - len(data))
      if not part:
        raise ConnectionError("the program ended")
      data += part
    return bytes(data)

  def _step(self, transfer, what):
    """Returns transfer(what), waiting for it as long as the limits allow."""
    while True:
      now = time.monotonic()
      if self._cancelled.is_set():
        raise _OverError("cancelled")
      if now >= self._deadline:
        raise _OverError("wall")
      if now >= self._next_poll:
        self._poll()
        self._next_poll = time.monotonic() + run.POLL_SECONDS
      self._socket.settimeout(run.POLL_SECONDS)
      try:
        return transfer(what)
      except TimeoutError:
        continue

  def _poll(self) -> None:
    reason = run.excess(self._running.usage(), self._limits)
    if reason:
      raise _OverError(reason)


class Worker:
  """Calls functions of one module in one sandboxed process.

  The process is started by the first call and again after one that ended it;
  the module is executed anew then and what it held is lost. Memory and disk
  are polled while a call runs; between calls the limits of each process hold.
  Calls from several threads wait for each other.
  """

  def __init__(
    self,
    box: run.Sandbox,
    source: str,
    *,
    limits: limits_lib.Limits | None = None,
    files: Mapping[str, str | bytes] | None = None,
    is_spent: Callable[[Any], bool] = lambda value: False,
  ):
    """Takes the text of a Python module; nothing is started yet.

    Args:
      box: where it runs.
      source: of the module. Functions are found by name, and take and return
        what JSON can hold.
      limits: `wall_seconds` is of a call; None: no bound of the CPU time, as
        that is of a whole life, and else as ever.
      files: given to each process in its folder.
      is_spent: tells from what a call returned that no other call is to meet
        this process.
    """
    if not isinstance(source, str):
      raise ValueError(f"{type(source)=} must be a string")
    self._box = box
    self._source = source
    self._limits = limits or limits_lib.Limits(cpu_seconds=None)
    self._files = files
    self._is_spent = is_spent
    self._connection = None
    self._calls = 0
    self._lock = threading.Lock()
    self.starts = 0

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def close(self) -> None:
    """Ends the process; the next call would start another."""
    with self._lock:
      self._drop()

  def call(self, function: str, arguments: Mapping[str, Any]) -> Reply:
    """Calls function(**arguments); ValueError if these are not JSON."""
    return self._call(function, arguments, None)

  async def call_async(
    self, function: str, arguments: Mapping[str, Any]
  ) -> Reply:
    """Is `call` in a thread; cancelling it ends the process."""
    return await run.in_thread(
      lambda cancelled: self._call(function, arguments, cancelled)
    )

  def _call(self, function, arguments, cancelled) -> Reply:
    if not isinstance(function, str) or not isinstance(arguments, Mapping):
      raise ValueError(f"{function=} must be a name, {arguments=} a mapping")
    arguments = dict(arguments)
    _encoded(arguments)
    with self._lock:
      if self._connection is None:
        reply = self._start()
        if reply.error:
          return reply
      self._calls += 1
      message = [self._calls, function, arguments]
      return self._ask(message, self._limits.wall_seconds, cancelled)

  def _start(self) -> Reply:
    python = [sys.executable, "-I", "-c", run.read_program("serve.py")]
    self._connection = Connection(
      self._box, python, limits=self._limits, files=self._files
    )
    self.starts += 1
    self._calls = 0
    message = {"source": self._source}
    reply = self._ask(message, _START_SECONDS, None)
    if reply.error:
      self._drop()
    return reply

  def _ask(self, message, seconds: float, cancelled) -> Reply:
    answer, reason = self._connection.exchange(message, seconds, cancelled)
    match answer:
      case [self._calls, "value", value]:
        # Of call 0 is what the module's start returned.
        if self._calls and self._is_spent(value):
          self._drop()
        return Reply(value=value)
      case [self._calls, "error", str(error)] if error:
        return Reply(error=error)
    self._drop()
    how = "ended or gave no answer" if reason == "exit" else f"limit: {reason}"
    return Reply(error=f"the process {how}", reason=reason)

  def _drop(self) -> None:
    if self._connection is not None:
      self._connection.close()
      self._connection = None


class _OverError(Exception):
  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def _encoded(content) -> bytes:
  try:
    return json.dumps(content, allow_nan=False).encode()
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f"cannot be sent as JSON: {error}") from error


def _refuse(constant: str):
  raise ValueError(f"{constant} is not JSON")
