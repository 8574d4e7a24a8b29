"""A cgroup (version 2) for a run, where this process may make one.

The kernel then holds memory and number of processes of a whole run; what polls
comes a moment late. A run's group lies in the one of this process, or beside
it: a group that has processes itself cannot hand controllers down. Groups are
removed with their runs; an empty one stays where this process is killed.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import time

from dsv32_jax.agents.sandbox import limits as limits_lib

_ROOT = pathlib.Path("/sys/fs/cgroup")
_OWN = pathlib.Path("/proc/self/cgroup")
_CONTROLLERS = ("memory", "pids")
# For shared memory, sockets and what the kernel holds for a run.
SLACK_BYTES = 32 << 20
# Bubblewrap itself, and its first process inside.
_SLACK_PROCESSES = 2
_REMOVE_SECONDS = 2.0
_COUNTER = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """The cgroup of one run."""

  folder: pathlib.Path

  @property
  def entrance(self) -> str:
    """The file that a process joins the group by, writing 0."""
    return str(self.folder / "cgroup.procs")

  def ran_out_of_memory(self) -> bool:
    """Returns whether the kernel ended processes of the group for memory."""
    text = (self.folder / "memory.events").read_text()
    return any(
      int(count) > 0
      for name, count in map(str.split, text.splitlines())
      if name == "oom_kill"
    )

  def remove(self) -> None:
    """Ends what is left in the group, and removes it."""
    # Kernels before 5.14 have no such file; the run has ended all by itself.
    with contextlib.suppress(OSError):
      (self.folder / "cgroup.kill").write_text("1")
    end = time.monotonic() + _REMOVE_SECONDS
    while True:
      try:
        return self.folder.rmdir()
      except OSError:
        if time.monotonic() > end:
          raise
      time.sleep(0.005)


def make(parent: pathlib.Path, limits: limits_lib.Limits) -> Group:
  """Makes the group of a run.

  `memory.max` has room for the files of the run besides, which may lie in
  memory. A run that exceeds it is ended as a whole.

  Args:
    parent: as `find` returns it.
    limits: of the run.

  Raises:
    SandboxError: it cannot be made.
  """
  folder = parent / f"sandbox-{os.getpid()}-{next(_COUNTER)}"
  memory = limits.memory_bytes + limits.disk_bytes + SLACK_BYTES
  bounds = {
    "memory.max": memory,
    "memory.oom.group": 1,
    "pids.max": limits.processes + _SLACK_PROCESSES,
  }
  try:
    folder.mkdir()
    # Where there is swap, it is memory as well.
    if (folder / "memory.swap.max").exists():
      bounds["memory.swap.max"] = 0
    for name, bound in bounds.items():
      (folder / name).write_text(str(bound))
  except OSError as error:
    with contextlib.suppress(OSError):
      folder.rmdir()
    raise limits_lib.SandboxError(f"cannot make a cgroup: {error}") from error
  return Group(folder=folder)


def entering(group: Group | None) -> list[str]:
  """Returns the command, to be put before another, that joins a group."""
  if group is None:
    return []
  return ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', group.entrance]


def find(root: pathlib.Path = _ROOT, own: pathlib.Path = _OWN) -> pathlib.Path:
  """Returns the group in which groups of runs can be made, tried once.

  Args:
    root: where version 2 is mounted.
    own: tells the group of this process.

  Raises:
    SandboxError: saying why there is none.
  """
  if not (root / "cgroup.controllers").exists():
    raise limits_lib.SandboxError(f"{root} is no cgroup of version 2")
  lines = own.read_text().splitlines()
  path = next((line[3:] for line in lines if line.startswith("0::")), "/..")
  if ".." in path:
    raise limits_lib.SandboxError("this process is in none that can be seen")
  mine = root / path.lstrip("/")
  # Only this process's own group is changed.
  with contextlib.suppress(OSError):
    wanted = " ".join(f"+{name}" for name in _CONTROLLERS)
    (mine / "cgroup.subtree_control").write_text(wanted)
  refusals = []
  for parent in (mine,) if mine == root else (mine, mine.parent):
    try:
      _try(parent)
      return parent
    except (limits_lib.SandboxError, OSError) as error:
      refusals.append(f"{parent}: {error}")
  raise limits_lib.SandboxError("; ".join(refusals))


@functools.cache
def found() -> tuple[pathlib.Path | None, str]:
  """Returns what `find` does, or None, and why not; looks once."""
  try:
    return find(), ""
  except (limits_lib.SandboxError, OSError) as error:
    return None, str(error)


def _try(parent: pathlib.Path) -> None:
  handed = (parent / "cgroup.subtree_control").read_text().split()
  for name in _CONTROLLERS:
    if name not in handed:
      raise limits_lib.SandboxError(f"it hands down no {name}")
  group = make(parent, limits_lib.Limits())
  try:
    joined = subprocess.run(
      [*entering(group), "/bin/true"],
      check=False,
      capture_output=True,
      text=True,
    )
    if joined.returncode:
      raise limits_lib.SandboxError(joined.stderr.strip())
    group.ran_out_of_memory()
  finally:
    group.remove()
