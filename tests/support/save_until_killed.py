"""Saves one checkpoint after another until it is killed.

Run as `python -m tests.support.save_until_killed FOLDER`. Prints each step
before its save starts. The arrays follow from the step alone: see `make_trees`.
"""

import sys

import jax
import jax.numpy as jnp

from dsv32_jax.training import checkpoint

# Large enough that a kill often meets a save under way.
SHAPE = (512, 1024)


def make_trees(step: int):
  """Returns the trees that step `step` saves."""
  key = jax.random.fold_in(jax.random.key(0), step)
  weights = {
    str(i): jax.random.normal(jax.random.fold_in(key, i), SHAPE, jnp.bfloat16)
    for i in range(4)
  }
  return {"params": weights, "rng": {"key": key}}


def main():
  config = checkpoint.CheckpointConfig(max_to_keep=2)
  with checkpoint.Checkpointer(sys.argv[1], config) as checkpointer:
    step = (checkpointer.latest_step() or 0) + 1
    while True:
      sys.stdout.write(f"{step}\n")
      sys.stdout.flush()
      checkpointer.save(step, make_trees(step), {"step": step})
      step += 1


if __name__ == "__main__":
  main()
