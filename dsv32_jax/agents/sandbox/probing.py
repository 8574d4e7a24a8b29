"""Which sandbox this machine can hold, found out by starting each."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile

from dsv32_jax.agents.sandbox import bubblewrap
from dsv32_jax.agents.sandbox import cgroups
from dsv32_jax.agents.sandbox import confine
from dsv32_jax.agents.sandbox import landlock
from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import run

_GROUP_BOUND = (
  "memory.max of a cgroup of the run's own, memory_bytes + disk_bytes + "
  f"{cgroups.SLACK_BYTES >> 20} MiB"
)
_MEMORY_BOUND = (
  "the private pages of all processes are summed every "
  f"{1000 * run.POLL_SECONDS:.0f} ms and the run is ended above memory_bytes; "
  "between two polls processes * memory_bytes of address space is the bound"
)
# Says whether it can read a file of the host, reach loopback, and is alone.
_SELF_TEST = """
import os, socket, sys
try:
  open(sys.argv[1]).read()
  print("reads the host's files")
except OSError:
  pass
try:
  socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=1)
  print("reaches the host's network")
except OSError:
  pass
try:
  os.kill(int(sys.argv[3]), 0)
  if os.readlink("/proc/self") != str(os.getpid()) or int(sys.argv[3]) != 1:
    print("signals the host's processes")
except OSError:
  pass
print("ran")
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
  """What the probe found.

  Attributes:
    backend: the first that works: bubblewrap, else Landlock; None: neither.
    refusals: backend name to why it was not taken, in one line.
    memory_bound: what holds the memory of all processes of a run together.
    process_bound: what holds their number.
  """

  backend: bubblewrap.Bubblewrap | landlock.Landlock | None
  refusals: dict[str, str]
  memory_bound: str
  process_bound: str

  def require(self) -> bubblewrap.Bubblewrap | landlock.Landlock:
    """Returns the backend; SandboxError that says what is missing."""
    if self.backend is None:
      reasons = "; ".join(f"{k}: {v}" for k, v in self.refusals.items())
      raise limits_lib.SandboxError(
        f"no sandbox works here, and code is not run without one: {reasons}"
      )
    return self.backend


def probe() -> Probe:
  """Starts each kind of sandbox in turn until one passes its self-test."""
  candidates = {
    "bubblewrap": lambda: find_bubblewrap(user_namespace=False),
    "bubblewrap in a user namespace": lambda: find_bubblewrap(
      user_namespace=True
    ),
    "landlock": find_landlock,
  }
  return choose(candidates)


def choose(candidates: dict[str, Callable]) -> Probe:
  """Returns the first candidate that passes, and why others do not."""
  refusals, chosen = {}, None
  for name, find in candidates.items():
    try:
      chosen = find()
      break
    except limits_lib.SandboxError as error:
      refusals[name] = " ".join(str(error).split())
  parent, why_not = cgroups.found()
  shared = isinstance(chosen, landlock.Landlock) and os.geteuid() != 0
  return Probe(
    backend=chosen,
    refusals=refusals,
    memory_bound=f"{_GROUP_BOUND}; besides, {_MEMORY_BOUND}"
    if parent
    else f"{_MEMORY_BOUND} (there is no cgroup for a run: {why_not})",
    process_bound=("pids.max of the run's cgroup, and " if parent else "")
    + "RLIMIT_NPROC of "
    + ("the user, over what ran at the start" if shared else "the run alone"),
  )


def find_bubblewrap(*, user_namespace: bool) -> bubblewrap.Bubblewrap:
  """Returns the backend, tested; SandboxError says why it does not work."""
  program = shutil.which("bwrap")
  if program is None:
    raise limits_lib.SandboxError("bwrap is not installed")
  if not user_namespace and os.geteuid() != 0:
    raise limits_lib.SandboxError("only root does without a user namespace")
  backend = bubblewrap.Bubblewrap(
    program=program, user_namespace=user_namespace
  )
  return _tested(backend)


def find_landlock() -> landlock.Landlock:
  """Returns the backend, tested; SandboxError says why it does not work."""
  version = confine.landlock_version()
  is_root = os.geteuid() == 0
  # Version 6 keeps signals inside, which else a user id of its own does.
  need = 1 if is_root else 6
  if version < need:
    raise limits_lib.SandboxError(
      f"Landlock {version=} of the kernel, {need} is needed"
    )
  return _tested(landlock.Landlock(has_unix_sockets=is_root))


def _tested(backend):
  box = run.Sandbox(backend)
  with tempfile.TemporaryDirectory() as folder, run.listening() as port:
    secret = pathlib.Path(folder) / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    pathlib.Path(folder).chmod(0o755)
    command = [sys.executable, "-I", "-c", _SELF_TEST, str(secret), str(port)]
    result = box.run([*command, str(os.getpid())])
  if result.stdout.split(b"\n") != [b"ran", b""]:
    said = (result.stdout + result.stderr).decode(errors="replace")
    raise limits_lib.SandboxError(
      f"self-test ended with {result.reason} {result.returncode}: {said[-300:]}"
    )
  return backend
