"""Parts of an experiment side by side, in processes that stay for several.

A process compiles once for all parts that it runs. None outlives this one,
however it ends, and all of them stop in order when it is asked to.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import multiprocessing
from multiprocessing import connection
import os
import threading
import traceback

from dsv32_jax.training import run as run_lib
from dsv32_jax.training import stop_signal

_POLL_SECONDS = 0.5
# How long a part may take to save its state.
_STOP_SECONDS = 600.0


@dataclasses.dataclass(kw_only=True)
class _Worker:
  """A process, what it says, and the part that it is at.

  Attributes:
    process: of its own.
    talk: takes names of parts, gives (kind, text) for each.
    alive: closed with this process, at which the worker ends.
    part: name, or None between two.
  """

  process: multiprocessing.Process
  talk: connection.Connection
  alive: connection.Connection
  part: str | None = None


def run(
  function: Callable[[str], None],
  parts: Sequence[str],
  *,
  processes: int,
  log: str,
  done: Callable[[str], None],
) -> None:
  """Calls a function of each part's name, several at a time.

  Args:
    function: keeps its result in a file; found by name from a new process.
    parts: their names; begun in this order.
    processes: at a time at most.
    log: path that gets what the parts print, with a number for each process.
    done: is told the name of a part that has ended.

  Raises:
    ValueError: that a part raised, with its name.
    RuntimeError: a part failed in another way, or its process died.
    training.run.Stopped: after a SIGTERM, once every part has stopped.
  """
  waiting, workers = list(parts), []
  with stop_signal.StopSignal() as stop:
    try:
      for number in range(1, min(processes, len(parts)) + 1):
        workers.append(_start(function, f"{log}_{number}.log"))
      while True:
        for worker in workers:
          if worker.part is None and waiting:
            worker.part = waiting.pop(0)
            worker.talk.send(worker.part)
        busy = [worker for worker in workers if worker.part is not None]
        if not busy:
          return
        talks = [worker.talk for worker in busy]
        ready = connection.wait(talks, _POLL_SECONDS)
        if stop.requested:
          raise run_lib.Stopped(f"stopped with {len(busy)} parts under way")
        for worker in busy:
          if worker.talk in ready:
            _hear(worker, log)
            done(worker.part)
            worker.part = None
    finally:
      _stop(workers)


def _start(function, log) -> _Worker:
  context = multiprocessing.get_context("spawn")
  talk, their_talk = context.Pipe()
  their_alive, alive = context.Pipe(duplex=False)
  process = context.Process(
    target=_work, args=(function, log, their_talk, their_alive)
  )
  process.start()
  their_talk.close()
  their_alive.close()
  return _Worker(process=process, talk=talk, alive=alive)


def _hear(worker, log) -> None:
  """Raises what became of a part unless it is done."""
  try:
    kind, text = worker.talk.recv()
  except EOFError:
    kind, text = "failed", "its process died"
  if kind == "stopped":
    raise run_lib.Stopped(f"{worker.part} {text}")
  if kind == "wrong":
    raise ValueError(f"{worker.part}: {text}")
  if kind == "failed":
    raise RuntimeError(f"{worker.part}: {text}; see {log}_*.log")


def _stop(workers) -> None:
  """Ends the processes; those at a part save its state first."""
  for worker in workers:
    if worker.part is None:
      # Nothing more is told: it leaves of itself.
      worker.talk.close()
    else:
      worker.process.terminate()
  for worker in workers:
    worker.process.join(_STOP_SECONDS)
    worker.alive.close()
    worker.process.join()
    worker.talk.close()


def _work(function, log, talk, alive) -> None:
  """Runs the parts that it is told, until it is stopped or left alone."""
  threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
  with open(log, "ab", buffering=0) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  with contextlib.suppress(EOFError):
    while True:
      kind, text = _outcome(function, talk.recv())
      talk.send((kind, text))
      if kind != "done":
        return


def _outcome(function, part) -> tuple[str, str]:
  try:
    function(part)
  except run_lib.Stopped as stopped:
    return "stopped", str(stopped)
  # Whatever a part raises is told to who waits for it.
  except Exception as error:
    traceback.print_exc()
    line = " ".join(str(error).split())
    if isinstance(error, ValueError):
      return "wrong", line
    return "failed", f"{type(error).__name__}: {line}"
  return "done", ""


def _end_with(alive) -> None:
  """Ends this process when the one at the other end has."""
  with contextlib.suppress(EOFError, OSError):
    alive.recv()
  os._exit(1)
