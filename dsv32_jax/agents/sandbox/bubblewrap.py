"""Sandbox of namespaces: bubblewrap, a user id of its own, a filter, limits.

What runs sees the system's programs, the Python it was started from and an
empty folder, all but the folder read-only; no network, not even the host's
loopback; no process but its own. The folder is a file system in memory with
a fixed size. With the first process of the namespace all others end, daemons
included.

Root starts it without a user namespace and changes to a user id that nobody
has: the kernel does not count processes of root, in a namespace or not. Any
other user, and root without that power, gets a user namespace, in which
processes are counted apart; more namespaces are refused there.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess

from dsv32_jax.agents.sandbox import cgroups
from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import processes
from dsv32_jax.agents.sandbox import seccomp
from dsv32_jax.agents.sandbox import users

FOLDER = "/box"
# POSIX shared memory and semaphores live there.
_SHARED_MEMORY_BYTES = 16 << 20
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bubblewrap:
  """Starts commands with bwrap.

  Attributes:
    program: path of bwrap.
    user_namespace: whether a user namespace replaces the powers of root.
    has_unix_sockets: always; they reach nothing outside.
  """

  program: str
  user_namespace: bool
  has_unix_sockets: bool = True

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
    """Starts argv; SandboxError if bwrap does not get as far as a process."""
    user = users.new_user() if os.geteuid() == 0 else None
    opened = [seccomp.descriptor(unix_sockets=unix_sockets)]
    info_in, info_out = os.pipe()
    try:
      options = ["--seccomp", str(opened[0]), "--info-fd", str(info_out)]
      options += self._namespaces() + _mounts(readable)
      options += ["--perms", "0777", "--size", str(limits.disk_bytes)]
      options += ["--tmpfs", FOLDER]
      for folder in limits_lib.folders_of(files):
        options += ["--perms", "0777", "--dir", f"{FOLDER}/{folder}"]
      for path, content in files.items():
        opened.append(seccomp.memory_file("file", content))
        options += ["--perms", "0666"]
        options += ["--file", str(opened[-1]), f"{FOLDER}/{path}"]
      options += ["--remount-ro", "/dev", "--remount-ro", "/"]
      options += ["--chdir", FOLDER]
      command = [self.program, *options, "--"]
      if user is not None and self.user_namespace:
        command = users.become(user) + command
      elif user is not None:
        command += users.become(user)
      command += users.limit(limits) + list(argv)
      command = cgroups.entering(group) + command
      process = subprocess.Popen(
        command,
        env={**environment, "HOME": FOLDER, "TMPDIR": FOLDER},
        pass_fds=[*opened, info_out, *pass_fds],
        **streams,
      )
    finally:
      for descriptor in [*opened, info_out]:
        os.close(descriptor)
    return _running(process, info_in, group)

  def _namespaces(self) -> list[str]:
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc"]
    options += ["--unshare-uts", "--unshare-cgroup-try", "--new-session"]
    options += ["--die-with-parent", "--hostname", "sandbox"]
    if self.user_namespace:
      return [*options, "--unshare-user", "--disable-userns"]
    powers = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID"]
    return [*options, *powers, "--cap-add", "CAP_SETGID"]


def _mounts(readable: Sequence[str]) -> list[str]:
  options = ["--ro-bind", "/usr", "/usr"]
  for path in _SYSTEM:
    if os.path.islink(path):
      options += ["--symlink", os.readlink(path), path]
    elif os.path.isdir(path):
      options += ["--ro-bind", path, path]
  for path in _SETTINGS:
    options += ["--ro-bind-try", path, path]
  options += ["--proc", "/proc", "--dev", "/dev"]
  options += ["--perms", "1777", "--size", str(_SHARED_MEMORY_BYTES)]
  options += ["--tmpfs", "/dev/shm"]
  paths = [pathlib.PurePosixPath(path) for path in readable]
  paths = [path for path in paths if not path.is_relative_to("/usr")]
  # Where readable things lie there, it cannot be the folder as well.
  if not any(path.is_relative_to("/tmp") for path in paths):
    options += ["--symlink", FOLDER[1:], "/tmp"]
  # Left to bwrap, the folders above would be closed to other users.
  for folder in limits_lib.folders_of(paths):
    options += ["--perms", "0755", "--dir", str(folder)]
  for path in paths:
    options += ["--ro-bind", str(path), str(path)]
  return options


def _running(
  process: subprocess.Popen, info_in: int, group: cgroups.Group | None
) -> processes.Running:
  """Waits for the first process of the namespace; it ends with all others."""
  text = b""
  with os.fdopen(info_in, "rb", buffering=0) as info:
    while b"}" not in text:
      chunk = info.read(4096)
      if not chunk:
        break
      text += chunk
  if b"}" not in text:
    process.kill()
    process.wait()
    processes.close_streams(process)
    raise limits_lib.SandboxError(
      f"bwrap ended with {process.returncode} before it started anything"
    )
  first = json.loads(text)["child-pid"]
  try:
    handle = os.pidfd_open(first)
  except ProcessLookupError:
    handle = None

  def disk() -> tuple[int, int]:
    try:
      box = os.statvfs(f"/proc/{first}/root{FOLDER}")
    except OSError:
      return 0, 0  # Not mounted yet, or over.
    used = (box.f_blocks - box.f_bfree) * box.f_frsize
    return used, box.f_files - box.f_ffree

  def end() -> None:
    if handle is not None:
      with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)
      # The kernel reports the first process of a namespace as ended when all
      # others are.
      poller = select.poll()
      poller.register(handle, select.POLLIN)
      poller.poll()
      os.close(handle)
    process.wait()
    processes.close_streams(process)

  return processes.Running(process=process, disk=disk, end=end, group=group)
