"""Saves checkpoints until the disk takes no more.

Run as `python -m tests.support.save_until_full FOLDER LIMIT`. Prints each step
once it is committed; then the error, and exits with code 3. With LIMIT > 0 no
file may grow beyond so many bytes from the second save on.
"""

import resource
import sys

from dsv32_jax.training import checkpoint
from tests.support import save_until_killed

# More than the small disk of the test holds.
STEPS = 8


def main():
  folder, limit = sys.argv[1], int(sys.argv[2])
  config = checkpoint.CheckpointConfig(max_to_keep=None)
  try:
    with checkpoint.Checkpointer(folder, config) as checkpointer:
      for step in range(1, STEPS + 1):
        if step == 2 and limit:
          resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpointer.save(step, save_until_killed.make_trees(step))
        checkpointer.wait()
        sys.stdout.write(f"{step}\n")
  except checkpoint.SaveError as error:
    sys.stdout.write(f"{error}\n")
    sys.exit(3)


if __name__ == "__main__":
  main()
