"""The code interpreter: Python cells in a stateful Jupyter kernel, sandboxed.

The agents of the paper run code in a Jupyter environment that answers with the
output or times out after 120 seconds; reasoning ones at most 20 times a task
(appendix B, tables 7 and 8).
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import sys
import threading

from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import run
from dsv32_jax.agents.sandbox import worker

_PROGRAM = pathlib.Path(__file__).with_name("interpreter_kernel.py")
# For the kernel to start, and to interrupt, kill and start it once more.
_START_SECONDS = 90.0
# JSON writes a character in at most 12 bytes.
_BYTES_A_CHARACTER = 12
STATUSES = ("ok", "error", "timeout", "died", "stopped", "refused")


def default_limits() -> limits_lib.Limits:
  """Returns limits that a kernel with its threads and NumPy fits in."""
  return limits_lib.Limits(
    cpu_seconds=None,
    memory_bytes=2 << 30,
    processes=64,
    output_bytes=2 << 20,
    disk_bytes=256 << 20,
    open_files=1024,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """What a cell did; all of it is the word of untrusted code.

  Attributes:
    status: "ok"; "error", an exception, its traceback in the output;
      "timeout"; "died", the kernel ended; "stopped", a limit of the sandbox
      ended all of it; "refused", no executions are left.
    output: what it printed, displayed and raised, as text.
    truncated: whether the output was longer.
    lost_state: whether later cells find none of the variables of this and
      earlier ones. After "stopped" the files are gone as well.
    reason: after "stopped", which limit.
  """

  status: str
  output: str = ""
  truncated: bool = False
  lost_state: bool = False
  reason: str = "exit"

  def observation(self) -> str:
    """Returns what the model is told."""
    notes = {
      "timeout": "[The cell took too long and was interrupted.]",
      "died": "[The kernel died.]",
      "stopped": f"[The environment was stopped, limit: {self.reason}.]",
      "refused": "[No code executions are left.]",
    }
    lines = [self.output.rstrip("\n")]
    if self.truncated:
      lines.append("[The output was longer.]")
    if self.status in notes:
      lines.append(notes[self.status])
    if self.lost_state:
      lines.append("[All variables are lost.]")
    return "\n".join(line for line in lines if line)


class Interpreter:
  """Runs cells one after another in one kernel.

  The kernel starts with the first cell. It needs unix sockets: bubblewrap has
  them, Landlock where this process is root (see `Sandbox.has_unix_sockets`).
  Under Landlock there are no terminals, and `!command` in a cell fails where
  `subprocess.run` works.
  """

  def __init__(
    self,
    box: run.Sandbox,
    *,
    cell_seconds: float = 120.0,
    max_executions: int = 20,
    output_characters: int = 20_000,
    limits: limits_lib.Limits | None = None,
    files: Mapping[str, str | bytes] | None = None,
  ):
    """Takes the bounds; nothing is started yet.

    Args:
      box: where the kernel runs.
      cell_seconds: after which a cell is interrupted.
      max_executions: cells in all; later ones are refused.
      output_characters: kept of what a cell says.
      limits: of the sandbox; `wall_seconds` is not used. None: default_limits.
      files: in the working folder at the start.
    """
    limits = limits or default_limits()
    if not (math.isfinite(cell_seconds) and cell_seconds > 0):
      raise ValueError(f"{cell_seconds=} must be finite and above 0")
    if max_executions < 0:
      raise ValueError(f"{max_executions=} must not be negative")
    most = limits.output_bytes // _BYTES_A_CHARACTER - 100
    if not 0 < output_characters <= most:
      raise ValueError(
        f"{output_characters=} must be above 0 and at most {most}, "
        f"which {limits.output_bytes=} has room for"
      )
    if not box.has_unix_sockets:
      raise limits_lib.SandboxError(
        "a Jupyter kernel needs unix sockets, which this sandbox has not"
      )
    self._box = box
    self._cell_seconds = cell_seconds
    self._output_characters = output_characters
    self._limits = limits
    self._files = files
    self._connection = None
    self._lock = threading.Lock()
    self.executions_left = max_executions

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def close(self) -> None:
    """Ends the kernel; a later cell would start a new one."""
    with self._lock:
      self._drop()

  def execute(self, code: str) -> Cell:
    """Runs a cell; SandboxError if no kernel can be started."""
    return self._execute(code, None)

  async def execute_async(self, code: str) -> Cell:
    """Is `execute` in a thread; cancelling it ends the kernel."""
    return await run.in_thread(lambda cancelled: self._execute(code, cancelled))

  def _execute(self, code: str, cancelled) -> Cell:
    if not isinstance(code, str):
      raise ValueError(f"{type(code)=} must be a string")
    with self._lock:
      if self.executions_left <= 0:
        return Cell(status="refused")
      self.executions_left -= 1
      if self._connection is None:
        self._start(cancelled)
      message = {"code": code, "seconds": self._cell_seconds}
      answer, reason = self._connection.exchange(
        message, self._cell_seconds + _START_SECONDS, cancelled
      )
      match answer:
        case {
          "status": "ok" | "error" | "timeout" | "died" as status,
          "output": str(output),
          "truncated": bool(truncated),
          "lost_state": bool(lost_state),
        }:
          return Cell(
            status=status,
            output=output[: self._output_characters],
            truncated=truncated,
            lost_state=lost_state,
          )
      self._drop()
      return Cell(status="stopped", lost_state=True, reason=reason)

  def _start(self, cancelled) -> None:
    python = [sys.executable, "-I", "-c", _PROGRAM.read_text()]
    self._connection = worker.Connection(
      self._box,
      python,
      limits=self._limits,
      files=self._files,
      unix_sockets=True,
    )
    message = {"output_characters": self._output_characters}
    answer, reason = self._connection.exchange(
      message, _START_SECONDS, cancelled
    )
    if answer != {"status": "ready"}:
      self._drop()
      raise limits_lib.SandboxError(
        f"no Jupyter kernel started in the sandbox: {reason=}; ipykernel and "
        "jupyter_client must be installed and the limits not too low"
      )

  def _drop(self) -> None:
    if self._connection is not None:
      self._connection.close()
      self._connection = None
