"""A started sandbox: what its processes use, and how to end all of them."""

from collections.abc import Callable
import contextlib
import dataclasses
import os
import pathlib
import subprocess

from dsv32_jax.agents.sandbox import cgroups

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """What a sandbox holds at one moment.

  Attributes:
    memory_bytes: private pages of all its processes.
    disk_bytes: of the files in its working folder.
    files: files and folders there.
  """

  memory_bytes: int
  disk_bytes: int
  files: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
  """A started sandbox.

  Attributes:
    process: ends when the sandboxed command does.
    disk: returns (bytes, files) of the working folder.
    end: ends every process of the sandbox and clears its folder away;
      returns when none is left.
    group: the cgroup of the run, if it has one.
  """

  process: subprocess.Popen
  disk: Callable[[], tuple[int, int]]
  end: Callable[[], None]
  group: cgroups.Group | None

  def stop(self) -> None:
    """Ends and clears away; to be called once, also after a normal end."""
    try:
      self.end()
    finally:
      if self.group is not None:
        self.group.remove()

  def how_it_ended(self) -> str:
    """Returns "memory" if the kernel ended it for that, else "exit"."""
    has_run_out = self.group is not None and self.group.ran_out_of_memory()
    return "memory" if has_run_out else "exit"

  def usage(self) -> Usage:
    disk_bytes, files = self.disk()
    memory_bytes = sum(map(private_bytes, descendants(self.process.pid)))
    return Usage(memory_bytes=memory_bytes, disk_bytes=disk_bytes, files=files)


def descendants(pid: int) -> list[int]:
  """Returns the processes under this one, parents first, at some moment."""
  found, waiting = [], [pid]
  while waiting:
    parent = waiting.pop()
    try:
      tasks = os.listdir(f"/proc/{parent}/task")
    except OSError:
      continue  # Ended since.
    for task in tasks:
      try:
        text = pathlib.Path(f"/proc/{parent}/task/{task}/children").read_text()
      except OSError:
        continue
      children = [int(child) for child in text.split()]
      found += children
      waiting += children
  return found


def private_bytes(pid: int) -> int:
  """Returns resident bytes that are no page of a file, 0 of an ended one."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/statm").read_text().split()
  except OSError:
    return 0
  return max(0, int(fields[1]) - int(fields[2])) * _PAGE_BYTES


def tree_usage(folder: str, most_files: int) -> tuple[int, int]:
  """Returns (bytes, files) under a folder; stops above most_files."""
  size, files, waiting = 0, 0, [folder]
  while waiting and files <= most_files:
    try:
      entries = list(os.scandir(waiting.pop()))
    except OSError:
      continue  # Gone, or closed to us: the size of the files bounds it still.
    for entry in entries:
      files += 1
      try:
        size += entry.stat(follow_symlinks=False).st_blocks * 512
        if entry.is_dir(follow_symlinks=False):
          waiting.append(entry.path)
      except OSError:
        continue
  return size, files


def close_streams(process: subprocess.Popen) -> None:
  """Closes the pipes to a process that ended."""
  for stream in (process.stdin, process.stdout, process.stderr):
    if stream is not None:
      with contextlib.suppress(BrokenPipeError):
        stream.close()
