"""Sandbox without namespaces: Landlock, a filter of system calls, limits.

For containers that forbid namespaces. What runs sees the system's programs,
the Python it was started from, both read-only, and a folder of its own. The
filter refuses every socket, Landlock every other path, signal and trace; see
`confine.py` for the order of it. Weaker than `bubblewrap.py` in this:

- names, sizes and owners of files outside can be learnt, not their content;
- the folder lies on the host's disk and its size is polled;
- without root, processes are counted together with all others of the user,
  and modes, owners and times of files cannot be set, not even of own ones.
"""

import base64
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

from dsv32_jax.agents.sandbox import cgroups
from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import processes
from dsv32_jax.agents.sandbox import seccomp
from dsv32_jax.agents.sandbox import users

_CONFINE = pathlib.Path(__file__).with_name("confine.py")
_READABLE = (
  "/usr",
  "/bin",
  "/sbin",
  "/lib",
  "/lib32",
  "/lib64",
  "/etc/ld.so.cache",
  "/etc/alternatives",
  "/etc/localtime",
  "/proc/cpuinfo",
  "/proc/meminfo",
  "/proc/stat",
)
_DEVICES = (
  "/dev/full",
  "/dev/null",
  "/dev/random",
  "/dev/urandom",
  "/dev/zero",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landlock:
  """Starts commands under Landlock.

  Attributes:
    has_unix_sockets: whether they may be asked for: with a user id of its own
      a command reaches only those open to everybody; with the user's it would
      reach all of the user's.
  """

  has_unix_sockets: bool

  def start(
    self,
    argv: Sequence[str],
    *,
    limits: limits_lib.Limits,
    files: Mapping[pathlib.PurePosixPath, bytes],
    readable: Sequence[str],
    environment: Mapping[str, str],
    unix_sockets: bool,
    pass_fds: Sequence[int],
    group: cgroups.Group | None,
    **streams,
  ) -> processes.Running:
    """Starts argv; SandboxError if it could not be confined."""
    user = users.new_user() if os.geteuid() == 0 else None
    rules = seccomp.program(
      unix_sockets=unix_sockets, own_user=user is not None
    )
    folder = _make_folder(files, user)
    paths = [path for path in _READABLE if os.path.exists(path)]
    paths += readable
    control_in, control_out = os.pipe()
    status_in, status_out = os.pipe()
    order = {
      "argv": list(argv),
      "environment": {**environment, "HOME": folder, "TMPDIR": folder},
      "folder": folder,
      "entrance": None if group is None else group.entrance,
      "user": user,
      "keep_reading": user is not None and not all(map(_is_open, readable)),
      "limits": _resource_limits(limits, user),
      "readable": paths,
      "devices": [path for path in _DEVICES if os.path.exists(path)],
      "filter": base64.b64encode(rules).decode(),
      "control": control_in,
      "status": status_out,
    }
    letter = seccomp.memory_file("order", json.dumps(order).encode())
    try:
      process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CONFINE), str(letter)],
        env={},
        pass_fds=[letter, control_in, status_out, *pass_fds],
        **streams,
      )
    except BaseException:
      os.close(control_out)
      os.close(status_in)
      _remove(folder)
      raise
    finally:
      for descriptor in (letter, control_in, status_out):
        os.close(descriptor)
    return _running(
      process, control_out, status_in, folder, limits.files, group
    )


def _running(process, control_out, status_in, folder, most_files, group):
  """Waits until the command is confined."""

  def end() -> None:
    # The supervisor ends the others, then itself. A byte, as a process forked
    # from this one may hold the descriptor too.
    with contextlib.suppress(BrokenPipeError):
      os.write(control_out, b".")
    os.close(control_out)
    process.wait()
    processes.close_streams(process)
    _remove(folder)

  with os.fdopen(status_in, "rb") as status:
    error = status.read()
  if error:
    end()
    raise limits_lib.SandboxError(
      f"cannot confine: {error.decode(errors='replace')}"
    )
  return processes.Running(
    process=process,
    disk=lambda: processes.tree_usage(folder, most_files),
    end=end,
    group=group,
  )


def _make_folder(files, user: int | None) -> str:
  folder = pathlib.Path(tempfile.mkdtemp(prefix="box-"))
  made = [folder]
  for path in limits_lib.folders_of(files):
    (folder / path).mkdir()
    made.append(folder / path)
  for path, content in files.items():
    (folder / path).write_bytes(content)
    made.append(folder / path)
  if user is not None:
    for path in made:
      os.chown(path, user, user)
  return str(folder)


def _remove(folder: str) -> None:
  """Removes what may be deep, closed to us, or full of links."""
  command = ["rm", "-rf", "--", folder]
  ended = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
  if ended.returncode:
    subprocess.run(["chmod", "-R", "u+rwx", "--", folder], check=True)
    subprocess.run(command, check=True)


def _resource_limits(limits: limits_lib.Limits, user: int | None):
  count = limits.processes
  if user is None:
    count += _threads_of(os.geteuid())
  bounds = {
    "RLIMIT_AS": (limits.memory_bytes,) * 2,
    "RLIMIT_NPROC": (count, count),
    "RLIMIT_FSIZE": (limits.disk_bytes,) * 2,
    "RLIMIT_NOFILE": (limits.open_files,) * 2,
    "RLIMIT_CORE": (0, 0),
    "RLIMIT_MEMLOCK": (0, 0),
    "RLIMIT_MSGQUEUE": (0, 0),
  }
  if limits.cpu_seconds is not None:
    bounds["RLIMIT_CPU"] = (limits.cpu_seconds, limits.cpu_seconds + 1)
  hard = {
    name: resource.getrlimit(getattr(resource, name))[1] for name in bounds
  }
  return {
    name: [_smaller(value, hard[name]) for value in pair]
    for name, pair in bounds.items()
  }


def _smaller(value: int, hard: int) -> int:
  return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _threads_of(user: int) -> int:
  threads = 0
  for entry in os.scandir("/proc"):
    if entry.name.isdigit():
      try:
        if entry.stat().st_uid == user:
          threads += len(os.listdir(f"/proc/{entry.name}/task"))
      except OSError:
        continue  # Ended since.
  return threads


def _is_open(path: str) -> bool:
  """Returns whether any user may reach a path."""
  here = pathlib.Path(path)
  return all(p.stat().st_mode & 0o001 for p in here.resolve().parents)
