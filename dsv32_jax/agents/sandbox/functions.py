"""Functions that a model wrote, each tried in a process of its own, and fast.

One sandboxed process stays and runs none of them: it makes a child of itself
for each, which takes a millisecond instead of an interpreter's start. What a
program does to its process, the next one does not meet. What is expected stays
on this side; the sandbox is given arguments alone.
"""

import atexit
from collections.abc import Sequence
import dataclasses
import functools
import json
import os
from typing import Any

from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import probing
from dsv32_jax.agents.sandbox import run
from dsv32_jax.agents.sandbox import worker as worker_lib

# What computes without end meets this one, however busy the machine is.
_CPU_SECONDS = 0.5
# For the sandbox itself to answer, beyond what the program may take.
_ANSWER_SECONDS = 5.0
_ERROR_CHARS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
  """What a function returned; all of it is the word of untrusted code.

  Attributes:
    values: JSON, one of each case; None where there is no answer.
    error: empty, or in one line why not: the program's exception, or `ended`.
    ended: empty, or what ended its process: a limit, a signal, an exit.
  """

  values: list[Any] | None = None
  error: str = ""
  ended: str = ""


class Functions:
  """Tries functions in one sandbox, one after the other; a context manager.

  The sandbox is started by the first call, and anew after one that ended it or
  left something in it.
  """

  def __init__(self, box: run.Sandbox, *, seconds: float = 8.0):
    """Takes the sandbox; nothing is started yet.

    Args:
      box: where programs run.
      seconds: of wall time that a program may take. On a busy machine even a
        right one takes its time, and only what waits needs this limit.
    """
    self._seconds = seconds
    self._worker = worker_lib.Worker(
      box,
      run.read_program("forked.py"),
      limits=limits_lib.Limits(
        wall_seconds=seconds + _ANSWER_SECONDS,
        cpu_seconds=None,
        memory_bytes=256 << 20,
        processes=8,
        disk_bytes=1 << 20,
        files=16,
      ),
      is_spent=_is_spent,
    )

  def call(
    self, program: str, name: str, cases: Sequence[Sequence[Any]]
  ) -> Outputs:
    """Calls a function of a program once for each case.

    Args:
      program: text of a Python module.
      name: of the function.
      cases: arguments of each call, of JSON.
    """
    order = self._order(program, name, cases)
    return _outputs(self._worker.call("values", order))

  async def call_async(
    self, program: str, name: str, cases: Sequence[Sequence[Any]]
  ) -> Outputs:
    """Is `call` in a thread."""
    order = self._order(program, name, cases)
    return _outputs(await self._worker.call_async("values", order))

  def _order(self, program, name, cases):
    return {
      # What has no UTF-8 form is no program: a mistake of whoever wrote it.
      "program": program.encode("utf-8", "replace").decode(),
      "name": name,
      "cases": [list(case) for case in cases],
      "cpu_seconds": _CPU_SECONDS,
      "seconds": self._seconds,
    }

  def close(self) -> None:
    """Ends the sandbox; the next call would start another."""
    self._worker.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


def shared() -> Functions:
  """Returns the one of this process, which lasts as long as that.

  Nothing is started before its first call.

  Raises:
    SandboxError: this machine offers no sandbox; the message says why.
  """
  return _of_process(os.getpid())


@functools.cache
def _of_process(pid: int) -> Functions:
  made = Functions(run.Sandbox(probing.probe().require()))

  def close():
    # A fork shares no socket with its parent, and does not end its sandbox.
    if os.getpid() == pid:
      made.close()

  atexit.register(close)
  return made


def _outputs(reply: worker_lib.Reply) -> Outputs:
  match reply.value:
    case ["answer", str(text), _]:
      return _read(text)
    case ["ended", str(over), _]:
      return Outputs(error=f"the program was ended: {over}", ended=over)
  # The sandbox itself is gone, or could not make a child.
  over = reply.error or "no answer"
  return Outputs(error=over, ended=over)


def _is_spent(value) -> bool:
  """Tells whether a program left something to the next one."""
  return value[-1:] != [True]


def _read(text):
  try:
    found = json.loads(text, parse_constant=_refuse)
  except (ValueError, RecursionError):
    return Outputs(error="the program wrote no JSON", ended="output")
  match found:
    case {"values": list(values)}:
      return Outputs(values=values)
    case {"error": str(error)} if error.strip():
      return Outputs(error=_line(error))
  return Outputs(error="the program wrote something else", ended="output")


def _line(text):
  """What a program wrote, as a line that can be shown and stored."""
  line = " ".join(text.split())[:_ERROR_CHARS]
  return line.encode("utf-8", "replace").decode()


def _refuse(constant):
  raise ValueError(f"{constant} is not JSON")
