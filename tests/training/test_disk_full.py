"""A disk that takes no more: the save says so, what was saved stays whole."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsv32_jax.training import checkpoint
from tests.support import save_until_full
from tests.support import save_until_killed

# A checkpoint of the program has about 3.5 MB.
DISK_MEGABYTES = 9
IN_A_SMALL_DISK = (
  *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
  # The disk goes when the shell does, so the folder is copied from it.
  "mount -t tmpfs -o size=$0m none $1/disk && { $2 -m $3 $1/disk/run 0;"
  " code=$?; cp -r $1/disk/run $1/copy; exit $code; }",
)


def can_mount() -> bool:
  """Whether this user may make a disk of memory for itself."""
  if shutil.which("unshare") is None:
    return False
  command = [*IN_A_SMALL_DISK[:-1], "mount -t tmpfs none /mnt"]
  return (
    subprocess.run(command, capture_output=True, check=False).returncode == 0
  )


def run_in_a_small_disk(folder):
  (folder / "disk").mkdir()
  values = DISK_MEGABYTES, folder, sys.executable, save_until_full.__name__
  return [*IN_A_SMALL_DISK, *map(str, values)], folder / "copy"


def run_with_small_files(folder):
  limit = 100_000
  program = [sys.executable, "-m", save_until_full.__name__]
  return [*program, str(folder / "run"), str(limit)], folder / "run"


@pytest.mark.parametrize(
  ("make", "reason"),
  [
    (run_with_small_files, "File too large"),
    pytest.param(
      run_in_a_small_disk,
      "No space left on device",
      marks=pytest.mark.skipif(
        not can_mount(), reason="no user namespace in which to mount"
      ),
    ),
  ],
)
def test_a_full_disk_is_told_and_spares_what_was_saved(tmp_path, make, reason):
  command, folder = make(tmp_path)
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=200, check=False
  )
  *steps, error = done.stdout.splitlines()
  assert done.returncode == 3, done.stderr
  assert error.startswith("a checkpoint could not be written in "), error
  assert reason in error
  steps = [int(step) for step in steps]
  assert 1 <= len(steps) < save_until_full.STEPS
  with checkpoint.Checkpointer(folder) as checkpointer:
    assert checkpointer.steps() == steps
    for step in steps:
      want = save_until_killed.make_trees(step)
      found = checkpointer.restore(want, step)
      for a, b in zip(
        jax.tree.leaves(found.trees["params"]),
        jax.tree.leaves(want["params"]),
        strict=True,
      ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # With space again, the run goes on.
    checkpointer.save(steps[-1] + 1, want)
  assert not list(folder.glob("*tmp*"))
