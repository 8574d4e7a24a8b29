"""One command in a sandbox: what goes in, what comes out, what ends it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import contextlib
import os
import pathlib
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TypeVar

from dsv32_jax.agents.sandbox import cgroups
from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import processes

POLL_SECONDS = 0.02
_T = TypeVar("_T")
_CHUNK = 1 << 16
_CPU_CODES = (128 + signal.SIGXCPU,)
_ENVIRONMENT = {
  "PATH": "/usr/bin:/bin",
  "LANG": "C.UTF-8",
  "USER": "sandbox",
  "PYTHONDONTWRITEBYTECODE": "1",
  # A thread a core would spend the limit of processes.
  "OMP_NUM_THREADS": "1",
  # Else each thread reserves address space of its own.
  "MALLOC_ARENA_MAX": "2",
  "OPENBLAS_NUM_THREADS": "1",
}


class Sandbox:
  """Runs commands under one backend.

  Grading. Nothing that comes out of a run says that it is right: code can
  print PASSED, exit with 0, write to any descriptor it was given, and read
  whatever it can see. So what is expected never enters the sandbox; the code
  answers questions, and this side compares. For answers there is a channel
  apart from stdout: `RESULT_FD` in the environment holds the number of a
  descriptor whose bytes become `Result.results`. Where tests must run inside,
  give them to a run of their own, after and apart from the one that the code
  could have left something in.
  """

  def __init__(
    self,
    backend,
    *,
    readable: Sequence[str | os.PathLike] = (),
    environment: Mapping[str, str] | None = None,
  ):
    """Takes a backend, as `probe().require()` gives it.

    Args:
      backend: Bubblewrap or Landlock.
      readable: files and folders that runs may read besides the system's
        programs and this Python.
      environment: variables that runs see besides a few fixed ones. None of
        this process's own is passed on.
    """
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix]
    paths = [*python, *map(os.fspath, readable)]
    for path in paths:
      if not (os.path.isabs(path) and os.path.exists(path)):
        raise ValueError(f"readable {path!r} must be an absolute path")
    self._backend = backend
    self._readable = list(dict.fromkeys(paths))
    self._environment = {**_ENVIRONMENT, **(environment or {})}
    # A sandbox dies with the thread that started it, so one thread that lasts
    # starts all of them.
    self._starter = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="sandbox-starter"
    )

  @property
  def has_unix_sockets(self) -> bool:
    return self._backend.has_unix_sockets

  def run(
    self,
    argv: Sequence[str],
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: str | bytes = b"",
    limits: limits_lib.Limits | None = None,
  ) -> limits_lib.Result:
    """Runs a command in an empty folder that holds `files`; see `Result`.

    Raises:
      ValueError: for a command or files that cannot be given.
      SandboxError: the sandbox could not be set up.
    """
    return self._run(argv, files, stdin, limits, threading.Event())

  async def run_async(
    self,
    argv: Sequence[str],
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: str | bytes = b"",
    limits: limits_lib.Limits | None = None,
  ) -> limits_lib.Result:
    """Is `run` in a thread; cancelling it ends the processes first."""
    return await in_thread(
      lambda cancelled: self._run(argv, files, stdin, limits, cancelled)
    )

  def start(
    self,
    argv: Sequence[str],
    *,
    limits: limits_lib.Limits,
    files: Mapping[str, str | bytes] | None = None,
    unix_sockets: bool = False,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    **streams,
  ) -> processes.Running:
    """Starts a command and leaves it running; the caller has to stop it."""
    if unix_sockets and not self.has_unix_sockets:
      raise limits_lib.SandboxError("this sandbox has no unix sockets")
    command = limits_lib.check_command(argv)
    given = limits_lib.check_files(files, limits)
    parent, _ = cgroups.found()
    group = None if parent is None else cgroups.make(parent, limits)
    try:
      return self._starter.submit(
        self._backend.start,
        command,
        limits=limits,
        files=given,
        readable=self._readable,
        environment={**self._environment, **(environment or {})},
        unix_sockets=unix_sockets,
        pass_fds=pass_fds,
        group=group,
        **streams,
      ).result()
    except BaseException:
      if group is not None:
        group.remove()
      raise

  def _run(self, argv, files, stdin, limits, cancelled):
    begin = time.monotonic()
    limits = limits or limits_lib.Limits()
    data = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
    channel_in, channel_out = os.pipe()
    try:
      try:
        running = self.start(
          argv,
          limits=limits,
          files=files,
          pass_fds=[channel_out],
          environment={"RESULT_FD": str(channel_out)},
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
        )
      finally:
        os.close(channel_out)
      watch = _Watch(running, channel_in, data, limits, cancelled)
      try:
        reason = watch.until_over(begin + limits.wall_seconds)
      finally:
        watch.close()
        # Reads what a normal end left in the pipes, before they are closed.
        running.stop()
    finally:
      os.close(channel_in)
    code = running.process.returncode if reason == "exit" else None
    if code in _CPU_CODES:
      code, reason = None, "cpu"
    elif code is not None and code < 0:
      code = 128 - code
    return limits_lib.Result(
      returncode=code,
      stdout=bytes(watch.received["stdout"]),
      stderr=bytes(watch.received["stderr"]),
      results=bytes(watch.received["results"]),
      reason=reason,
      seconds=time.monotonic() - begin,
      peak_memory_bytes=watch.peak_memory_bytes,
    )


class _Watch:
  """Moves bytes in and out of a run until something ends it."""

  def __init__(self, running, channel_in, data, limits, cancelled):
    self.received = {n: bytearray() for n in ("stdout", "stderr", "results")}
    self.peak_memory_bytes = 0
    self._running = running
    self._limits = limits
    self._cancelled = cancelled
    self._left = memoryview(data)
    self._selector = selectors.DefaultSelector()
    process = running.process
    self._sources = {
      process.stdout.fileno(): "stdout",
      process.stderr.fileno(): "stderr",
      channel_in: "results",
    }
    for descriptor in self._sources:
      os.set_blocking(descriptor, False)
      self._selector.register(descriptor, selectors.EVENT_READ)
    self._ended = os.pidfd_open(process.pid)
    self._selector.register(self._ended, selectors.EVENT_READ)
    self._stdin = process.stdin
    os.set_blocking(self._stdin.fileno(), False)
    self._selector.register(self._stdin, selectors.EVENT_WRITE)
    self._feed()

  def close(self) -> None:
    self._selector.close()
    os.close(self._ended)

  def until_over(self, deadline: float) -> str:
    """Returns why the run is over; it may still have processes."""
    next_poll = time.monotonic() + POLL_SECONDS
    while True:
      now = time.monotonic()
      if self._cancelled.is_set():
        return "cancelled"
      if now >= deadline:
        return "wall"
      if now >= next_poll:
        reason = self._poll()
        if reason:
          return reason
        next_poll = time.monotonic() + POLL_SECONDS
      over = False
      for key, _ in self._selector.select(min(next_poll, deadline) - now):
        if key.fd == self._ended:
          over = True
        elif key.fd in self._sources:
          self._read(key.fd)
        else:
          self._feed()
      if over:
        for descriptor in list(self._sources):
          while descriptor in self._sources and self._read(descriptor):
            if self._is_flooded():
              break
      if self._is_flooded():
        return "output"
      if over:
        return self._running.how_it_ended()

  def _read(self, descriptor: int) -> bool:
    """Takes what is there; returns whether there may be more."""
    try:
      chunk = os.read(descriptor, _CHUNK)
    except BlockingIOError:
      return False
    if not chunk:
      self._selector.unregister(descriptor)
      del self._sources[descriptor]
      return False
    name = self._sources[descriptor]
    other = "stderr" if name == "stdout" else "stdout"
    used = len(self.received[name])
    used += len(self.received[other]) if name != "results" else 0
    # One byte more than allowed tells a full pipe from a flood.
    room = max(0, self._limits.output_bytes + 1 - used)
    self.received[name] += chunk[:room]
    return True

  def _is_flooded(self) -> bool:
    text = len(self.received["stdout"]) + len(self.received["stderr"])
    most = self._limits.output_bytes
    if text <= most and len(self.received["results"]) <= most:
      return False
    for name in self.received:
      if len(self.received[name]) > most:
        del self.received[name][most:]
    return True

  def _feed(self) -> None:
    """Gives stdin as much as it takes; closes it behind the last byte."""
    try:
      while self._left:
        self._left = self._left[os.write(self._stdin.fileno(), self._left) :]
    except BlockingIOError:
      return
    except BrokenPipeError:
      pass
    self._selector.unregister(self._stdin)
    self._stdin.close()

  def _poll(self) -> str:
    usage = self._running.usage()
    self.peak_memory_bytes = max(self.peak_memory_bytes, usage.memory_bytes)
    return excess(usage, self._limits)


def excess(usage: processes.Usage, limits: limits_lib.Limits) -> str:
  """Returns which limit is exceeded, or nothing."""
  if usage.memory_bytes > limits.memory_bytes:
    return "memory"
  # A full file system refuses by itself; this is for the other kind.
  if usage.disk_bytes > limits.disk_bytes:
    return "disk"
  return "files" if usage.files > limits.files else ""


async def in_thread(work: Callable[[threading.Event], _T]) -> _T:
  """Runs work in a thread; cancelling sets its event and waits for its end."""
  cancelled = threading.Event()
  future = asyncio.ensure_future(asyncio.to_thread(work, cancelled))
  try:
    return await asyncio.shield(future)
  except asyncio.CancelledError:
    cancelled.set()
    await asyncio.wait([future])
    if not future.cancelled():
      future.exception()  # Of no interest any more, but has to be asked for.
    raise


@contextlib.contextmanager
def listening():
  """Yields the port of a listener on the host's loopback."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    yield server.getsockname()[1]


def read_program(name: str) -> str:
  """Returns the source of a program of this package that runs inside."""
  return pathlib.Path(__file__).with_name(name).read_text()
