"""Parts that run side by side in tests, and a program that waits for them."""

import os
import pathlib
import sys
import time

from dsv32_jax.recipe import side_by_side
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import stop_signal


def part(folder: str, name: str) -> None:
  """Does what its name says, and leaves a file with its process's number."""
  sys.stdout.write(f"{name} begins\n")
  sys.stdout.flush()
  if name.startswith("wrong"):
    raise ValueError("two\nlines")
  if name.startswith("bug"):
    raise KeyError("x")
  if name.startswith("dies"):
    os._exit(9)
  if name.startswith("waits"):
    with stop_signal.StopSignal() as stop:
      pathlib.Path(folder, name).write_text(str(os.getpid()))
      # Far longer than a test takes.
      for _ in range(3000):
        time.sleep(0.1)
        if stop.requested:
          pathlib.Path(folder, f"{name}.saved").touch()
          raise run_lib.Stopped("in order")
  pathlib.Path(folder, name).write_text(str(os.getpid()))
  time.sleep(0.2)


class Parts:
  """`part` with its folder, found by name from a new process."""

  def __init__(self, folder):
    self.folder = str(folder)

  def __call__(self, name):
    part(self.folder, name)


def run(folder, names, *, processes=2, done=lambda name: None) -> None:
  side_by_side.run(
    Parts(folder),
    names,
    processes=processes,
    log=os.path.join(folder, "log"),
    done=done,
  )


if __name__ == "__main__":
  run(sys.argv[1], ["waits_1", "waits_2", "later"])
