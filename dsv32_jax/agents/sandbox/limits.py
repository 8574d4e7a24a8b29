"""What sandboxed code may use, and what became of it."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import numbers
import pathlib

# Why a run ended. "exit": by itself, whatever its return code.
REASONS = (
  "exit",
  "wall",
  "cpu",
  "memory",
  "output",
  "disk",
  "files",
  "cancelled",
)
# The kernel takes no longer argument.
_MAX_ARGUMENT_BYTES = 128 * 1024 - 1
# Each file of a run travels in a descriptor of its own.
_MAX_GIVEN_FILES = 400
_MAX_PATH_BYTES = 2048
# Of any limit: what the kernel takes for one, in bytes a petabyte.
_MOST = 1 << 50


class SandboxError(RuntimeError):
  """The sandbox itself could not be set up: never the fault of what runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds of one run or one worker. There is never a network.

  Attributes:
    wall_seconds: of a run, or of one call of a worker.
    cpu_seconds: of each process, over its whole life; None: no bound.
    memory_bytes: address space of each process, and what all of them together
      may hold in private pages; the sum is polled (see `probe`).
    processes: processes and threads at one time.
    output_bytes: of stdout and stderr together, and of the result channel.
    disk_bytes: of all files in the working folder.
    files: files and folders in the working folder.
    open_files: descriptors of each process.
  """

  wall_seconds: float = 10.0
  cpu_seconds: int | None = 10
  memory_bytes: int = 1 << 30
  processes: int = 32
  output_bytes: int = 1 << 20
  disk_bytes: int = 64 << 20
  files: int = 4096
  open_files: int = 256

  def __post_init__(self):
    wall = self.wall_seconds
    if isinstance(wall, bool) or not isinstance(wall, numbers.Real):
      raise ValueError(f"wall_seconds={wall!r} must be a number")
    if not (math.isfinite(wall) and wall > 0):
      raise ValueError(f"wall_seconds={wall!r} must be finite and above 0")
    for name, low in (
      ("memory_bytes", 1 << 24),
      ("processes", 1),
      ("output_bytes", 0),
      ("disk_bytes", 1 << 12),
      ("files", 1),
      ("open_files", 16),
    ):
      _require_integer(name, getattr(self, name), low)
    if self.cpu_seconds is not None:
      _require_integer("cpu_seconds", self.cpu_seconds, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What one run did.

  All of it but `reason`, `seconds` and `peak_memory_bytes` comes from
  untrusted code: `stdout` that says PASSED is no evidence of anything.

  Attributes:
    returncode: as a shell has it: 128 + n after signal n. None where the
      sandbox stopped the run.
    stdout: bytes, at most `output_bytes` together with stderr.
    stderr: bytes.
    results: what was written to the result channel.
    reason: one of REASONS.
    seconds: wall time, the start and the clearing away included.
    peak_memory_bytes: the highest sum that polling saw; 0 if the run ended
      before the first poll.
  """

  returncode: int | None
  stdout: bytes
  stderr: bytes
  results: bytes
  reason: str
  seconds: float
  peak_memory_bytes: int


def check_command(argv: Sequence[str]) -> list[str]:
  """Returns argv as a list, or raises ValueError for what cannot be run."""
  if isinstance(argv, (str, bytes)) or not argv:
    raise ValueError(f"{argv=} must be a list of one or more strings")
  for argument in argv:
    if not isinstance(argument, str) or "\0" in argument:
      raise ValueError(f"{argument=} must be a string with no NUL in it")
    if len(argument.encode("utf-8", "surrogateescape")) > _MAX_ARGUMENT_BYTES:
      raise ValueError(
        f"an argument of {len(argument)} characters is too long: pass a file"
      )
  if not argv[0]:
    raise ValueError(f"{argv[0]=} names no program")
  return list(argv)


def check_files(
  files: Mapping[str, str | bytes] | None, limits: Limits
) -> dict[pathlib.PurePosixPath, bytes]:
  """Returns path to bytes; ValueError for a path that leaves the folder."""
  checked = {}
  for name, content in (files or {}).items():
    path = pathlib.PurePosixPath(name)
    bad = path.is_absolute() or ".." in path.parts or not path.parts
    if bad or "\0" in name or any(len(p.encode()) > 255 for p in path.parts):
      raise ValueError(f"file {name!r} must be a path inside the folder")
    if len(name.encode()) > _MAX_PATH_BYTES:
      raise ValueError(f"a file's path has {len(name)} characters: too long")
    if not isinstance(content, (str, bytes)):
      raise ValueError(f"file {name!r} must hold str or bytes")
    checked[path] = content.encode() if isinstance(content, str) else content
  for path in checked:
    for parent in path.parents:
      if parent in checked:
        raise ValueError(f"file {str(parent)!r} is also a folder of {path}")
  count = len(checked) + len(folders_of(checked))
  if count > min(_MAX_GIVEN_FILES, limits.files):
    raise ValueError(
      f"{count} files and folders given, at most "
      f"{min(_MAX_GIVEN_FILES, limits.files)} can be"
    )
  size = sum(map(len, checked.values()))
  if size > limits.disk_bytes:
    raise ValueError(f"files of {size} bytes exceed {limits.disk_bytes=}")
  return checked


def folders_of(paths) -> list[pathlib.PurePosixPath]:
  """Returns the folders that these files need, parents first."""
  folders = {parent for path in paths for parent in path.parents if parent.name}
  return sorted(folders, key=lambda folder: len(folder.parts))


def _require_integer(name: str, value, low: int) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(f"{name}={value!r} must be an integer")
  if not low <= value <= _MOST:
    raise ValueError(f"{name}={value} must be from {low} to {_MOST}")
