"""Confines itself and runs a command; a program of its own, stdlib only.

`python -I -S confine.py FD`: the order, JSON (see `landlock.py`), is read from
that descriptor. The supervisor, this process, adopts whatever its descendants
leave behind, and ends all of them when the command ends or the control
descriptor closes or speaks: also when whoever started it is killed. The
command runs in a child that joined the run's cgroup, if it has one, and gave
up, in this order: root, its limits, the file system but for what Landlock
grants, and the system calls of the filter. A child cannot signal or trace the
supervisor. What goes wrong up to there is written to the status descriptor.
"""

import base64
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import stat
import sys
import time

_LIBC = ctypes.CDLL(None, use_errno=True)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
# Access rights to files that each version of Landlock knows, from version 1.
_RIGHTS = (13, 14, 15, 15, 16, 16)
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER, _SUBREAPER = 38, 22, 2, 36
_KEEP_CAPABILITIES, _AMBIENT, _RAISE = 8, 47, 2
_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION = 0x20080522


class _Ruleset(ctypes.Structure):
  _fields_ = [(n, ctypes.c_uint64) for n in ("files", "network", "scopes")]


class _PathRule(ctypes.Structure):
  _pack_ = 1
  _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class _Program(ctypes.Structure):
  _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def checked(result: int, what: str) -> int:
  """Returns what a system call did, or raises its error."""
  if result < 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")
  return result


def prctl(what: str, *numbers) -> None:
  """Sets something of this process; `what` is for the error."""
  padded = [ctypes.c_ulong(n) for n in (*numbers, 0, 0, 0, 0)[:5]]
  checked(_LIBC.prctl(*padded), what)


def landlock_version() -> int:
  """Returns the kernel's version of Landlock, 0 where there is none."""
  return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def restrict_files(readable, writable, devices) -> None:
  """Leaves these paths; refuses TCP, and signals to processes outside."""
  version = landlock_version()
  every = (1 << _RIGHTS[min(version, len(_RIGHTS)) - 1]) - 1
  # The two bits of each: bind and connect; abstract sockets and signals.
  rules = _Ruleset(every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
  size = 8 if version < 4 else 16 if version < 6 else 24
  ruleset = checked(
    _LIBC.syscall(
      _CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0
    ),
    "landlock_create_ruleset",
  )
  read = _EXECUTE | _READ_FILE | _READ_DIR
  device = _READ_FILE | _WRITE_FILE | _IOCTL_DEVICE
  for paths, access in ((readable, read), (writable, every), (devices, device)):
    for path in paths:
      parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
      is_folder = stat.S_ISDIR(os.fstat(parent).st_mode)
      granted = access & every & (-1 if is_folder else _OF_FILES)
      rule = _PathRule(granted, parent)
      checked(
        _LIBC.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0),
        f"landlock_add_rule {path}",
      )
      os.close(parent)
  checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
  os.close(ruleset)


def become(user: int, keep_reading: bool) -> None:
  """Gives up root; may keep the power to read what Landlock grants."""
  if keep_reading:
    prctl("keep capabilities", _KEEP_CAPABILITIES, 1)
  os.setgroups([])
  os.setresgid(user, user, user)
  os.setresuid(user, user, user)
  if keep_reading:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)(*[1 << _DAC_READ_SEARCH] * 3, 0, 0, 0)
    checked(_LIBC.capset(header, data), "capset")
    prctl("ambient capability", _AMBIENT, _RAISE, _DAC_READ_SEARCH)


def run_command(order) -> None:
  """Turns this process into the confined command; does not come back."""
  status = order["status"]
  try:
    os.close(order["control"])
    os.setsid()
    os.chdir(order["folder"])
    if order["entrance"] is not None:
      with open(order["entrance"], "w") as entrance:
        entrance.write("0")
    if order["user"] is not None:
      become(order["user"], order["keep_reading"])
    for name, (soft, hard) in order["limits"].items():
      resource.setrlimit(getattr(resource, name), (soft, hard))
    prctl("no new privileges", _NO_NEW_PRIVILEGES, 1)
    restrict_files(order["readable"], [order["folder"]], order["devices"])
    filter_bytes = base64.b64decode(order["filter"])
    program = _Program(len(filter_bytes) // 8, filter_bytes)
    address = ctypes.addressof(program)
    prctl("seccomp", _SECCOMP, _FILTER, address)
  except Exception as error:
    os.write(status, f"{type(error).__name__}: {error}".encode())
    os._exit(125)
  os.close(status)
  # What Python ignores would stay ignored.
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
  argv = order["argv"]
  try:
    os.execvpe(argv[0], argv, order["environment"])
  except OSError as error:
    os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
    os._exit(127)


def children() -> list[int]:
  """Returns the direct children of this process."""
  with open(f"/proc/self/task/{os.getpid()}/children") as file:
    return [int(pid) for pid in file.read().split()]


def end_all() -> None:
  """Kills descendants until none is left; orphans become children of ours."""
  while True:
    for pid in children():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    except ChildProcessError:
      return
    time.sleep(0.001)


def main() -> None:
  """Runs the ordered command and ends all that came of it."""
  with os.fdopen(int(sys.argv[1]), "rb") as letter:
    order = json.load(letter)
  prctl("subreaper", _SUBREAPER, 1)
  child = os.fork()
  if child == 0:
    run_command(order)
  os.close(order["status"])
  ended = os.pidfd_open(child)
  ready = []
  while not ready:
    ready, _, _ = select.select([order["control"], ended], [], [], None)
  code = 137
  if ended in ready:
    info = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    code = info.si_status + (0 if info.si_code == os.CLD_EXITED else 128)
  end_all()
  if order["control"] in ready and not os.read(order["control"], 1):
    # Closed and not asked to end: nobody is left who would clear up.
    os.execv("/bin/rm", ["rm", "-rf", "--", order["folder"]])
  os._exit(code)


if __name__ == "__main__":
  main()
