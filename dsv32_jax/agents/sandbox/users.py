"""User ids that nobody has, and resource limits, set by util-linux."""

import itertools
import os
import pathlib
import shutil
import threading

from dsv32_jax.agents.sandbox import limits as limits_lib

_COUNTER = itertools.count()
_LOCK = threading.Lock()
SLOTS = 256


def new_user() -> int:
  """Returns a user id, the same for at most one run in 256 of this process.

  Processes of one id are counted together, so two runs do not share one. Where
  this process sees few ids, as in a container that maps 65536, they may.
  """
  with _LOCK:
    slot = next(_COUNTER) % SLOTS
  return first_user() + slot


def first_user() -> int:
  """Returns the lowest of the SLOTS user ids of this process."""
  rows = pathlib.Path("/proc/self/uid_map").read_text().splitlines()
  first, _, count = (int(field) for field in rows[-1].split())
  if first + count >= (1 << 32) - 1:
    return (1 << 30) + os.getpid() * SLOTS
  return 20000 + os.getpid() * SLOTS % 40000


def become(user: int) -> list[str]:
  """Returns the command, to be put before another, that changes the user."""
  ids = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
  return [_find("setpriv"), *ids, "--inh-caps=-all", "--"]


def limit(limits: limits_lib.Limits) -> list[str]:
  """Returns the command, to be put before another, that sets its limits."""
  options = [
    f"--as={limits.memory_bytes}",
    f"--nproc={limits.processes}",
    f"--fsize={limits.disk_bytes}",
    f"--nofile={limits.open_files}",
    "--core=0",
    "--memlock=0",
    "--msgqueue=0",
  ]
  if limits.cpu_seconds is not None:
    # The second, a second later, is for those who ignore the first.
    options.append(f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}")
  return [_find("prlimit"), *options, "--"]


def _find(program: str) -> str:
  path = shutil.which(program, path="/usr/bin:/bin")
  if path is None:
    raise limits_lib.SandboxError(f"{program} of util-linux is not installed")
  return path
