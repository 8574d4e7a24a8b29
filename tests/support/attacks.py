"""What tests of hostile code share: its limits, and a run that looks after it.

Each attack is a Python script that prints LEAK where it got through. After
each the host has no process, no file and no listener of it.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
import time

import pytest

from dsv32_jax.agents import sandbox
from dsv32_jax.agents.sandbox import probing
from dsv32_jax.agents.sandbox import users

# Tests run side by side, and each looks at the whole host.
MARK = f"attack-7f3a9c-{os.getpid()}-"
BACKENDS = ("bubblewrap", "landlock")
LIMITS = sandbox.Limits(
  wall_seconds=3.0,
  cpu_seconds=2,
  memory_bytes=256 << 20,
  processes=20,
  output_bytes=100_000,
  disk_bytes=8 << 20,
  files=200,
)


def make(name: str) -> sandbox.Sandbox:
  """Returns a sandbox of one of BACKENDS, for whoever runs the tests."""
  return sandbox.Sandbox(find(name))


def find(name: str):
  """Returns one of BACKENDS, for whoever runs the tests."""
  if name == "landlock":
    return probing.find_landlock()
  return probing.find_bubblewrap(user_namespace=os.geteuid() != 0)


@pytest.fixture(scope="module", params=BACKENDS)
def attack(request):
  """Returns run(script, *arguments, files, **limits); it checks the host."""
  box = make(request.param)

  def run(script, *arguments, files=None, **changed):
    folders = set(pathlib.Path(tempfile.gettempdir()).glob("box-*"))
    limits = dataclasses.replace(LIMITS, **changed)
    command = [sys.executable, "-I", "-c", f"# {MARK}\n" + script]
    begin = time.monotonic()
    result = box.run(
      [*command, *map(str, arguments)], files=files, limits=limits
    )
    assert time.monotonic() - begin < limits.wall_seconds + 1.5
    assert not processes_with(MARK)
    left = set(pathlib.Path(tempfile.gettempdir()).glob("box-*")) - folders
    assert not [path for path in left if is_of_this_process(path)]
    assert b"LEAK" not in result.stdout, result
    return result

  return run


def is_of_this_process(path: pathlib.Path) -> bool:
  """Returns whether a folder belongs to a user id that this process made up."""
  try:
    owner = path.stat().st_uid
  except FileNotFoundError:
    return False  # Another's, gone since.
  return users.first_user() <= owner < users.first_user() + users.SLOTS


def processes_with(text: str) -> list[int]:
  """Returns the processes, zombies apart, with this on their command line."""
  pids = [
    int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()
  ]
  pids.remove(os.getpid())
  return [pid for pid in pids if text.encode() in command_line(pid)]


def command_line(pid: int) -> bytes:
  """Returns a process's command line, empty of one that ended.

  A zombie has none either: it runs no more, and waits for who reaps it.
  """
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  except OSError:
    return b""
