"""Calls functions, each in a child of this process; runs inside a sandbox.

Stdlib only: the text of this file is what `functions.Functions` serves. This
process runs nothing that a model wrote. A child does, with memory of its own,
without this process's descriptors, and without a right to children. It could
still write into this process by way of /proc, were that not forbidden, and
leave files or priorities to the next one; where it did, the caller is told.
"""

import ctypes
import json
import os
import resource
import select
import signal
import time

_MOST_BYTES = 1 << 16
_MOST_DESCRIPTORS = 4096
_CPU_SIGNALS = (signal.SIGPROF, signal.SIGXCPU)
# Folders in which a child may be able to write.
_FOLDERS = (".", "/dev/shm")
_PR_SET_DUMPABLE = 4


def _forbid_writing_into_this_process() -> None:
  """Closes /proc/PID/mem to processes of the same user."""
  if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
    raise OSError("the process cannot be closed to its children")


def _surroundings() -> list:
  """What a child can change of what the next one meets."""
  return [
    *map(_names, _FOLDERS),
    os.sched_getscheduler(0),
    os.getpriority(os.PRIO_PROCESS, 0),
    os.sched_getaffinity(0),
  ]


def _names(folder):
  try:
    return os.listdir(folder)
  except OSError:
    return None


_forbid_writing_into_this_process()
_AT_FIRST = _surroundings()


def values(
  program: str, name: str, cases: list, cpu_seconds: float, seconds: float
) -> list:
  """Executes a program in a child and calls one of its functions.

  Args:
    program: text of a Python module.
    name: of the function.
    cases: the arguments of each call, a list each.
    cpu_seconds: for the whole of it, below 1.
    seconds: of wall time, likewise for the whole.

  Returns:
    ["answer", text as the child wrote it], or ["ended", why it wrote none], and
    behind it whether this process is still as it was for the next program.
  """
  reader, writer = os.pipe()
  child = os.fork()
  if not child:
    _answer(writer, program, name, cases, cpu_seconds)
  os.close(writer)
  try:
    text, over = _read(reader, time.monotonic() + seconds)
  finally:
    os.close(reader)
    # One that ended stays as it ended; one that only closed its pipe does not.
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
  if not over and os.WIFSIGNALED(status):
    number = os.WTERMSIG(status)
    over = "cpu" if number in _CPU_SIGNALS else f"signal {number}"
  if not over and not text:
    over = "exit"
  told = ["ended", over] if over else ["answer", text.decode(errors="replace")]
  return [*told, _surroundings() == _AT_FIRST]


def _read(reader, deadline):
  """Reads until the other end closes; returns also what went wrong."""
  text = b""
  while True:
    left = max(deadline - time.monotonic(), 0)
    if not select.select([reader], [], [], left)[0]:
      return text, "wall"
    part = os.read(reader, 1 << 16)
    if not part:
      return text, ""
    text += part
    if len(text) > _MOST_BYTES:
      return text, "output"


def _answer(writer, program, name, cases, cpu_seconds):
  """The child: writes {"values": [...]} or {"error": one line} and ends."""
  try:
    os.closerange(3, writer)
    os.closerange(writer + 1, _MOST_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
      scope = {"__name__": "program"}
      exec(compile(program, "program.py", "exec"), scope)
      found = {"values": [scope[name](*case) for case in cases]}
      text = json.dumps(found, allow_nan=False)
    except BaseException as error:
      line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      text = json.dumps({"error": line})
    # One byte beyond what is taken tells of more.
    os.write(writer, text.encode()[: _MOST_BYTES + 1])
  finally:
    os._exit(0)
