"""experiments.kernels_products: steps of tiles by hand, a mistake's line."""

import subprocess
import sys

import jax
import pytest

from experiments import kernels_products
from pallas_kernels import schedule


def kernel(bundles, matmuls):
  loop = schedule.Loop(
    start=0,
    stop=bundles,
    trips=None,
    inner=(),
    shares={},
    matmuls=matmuls,
    copies=0,
  )
  return schedule.Kernel(name="made_up", bundles=bundles, loops=(loop,))


def test_a_kernel_takes_its_steps_and_those_of_shared_tiles():
  # 64 tiles of 512 rows and 15 that experts share, by 7 x 2.
  steps = (64 + 15) * 7 * 2
  least = 512 * 1024 * 1024 / (4 * 128 * 128)
  count = bundles_of(kernel(9000, int(least) // 4))
  assert count == steps * 9000
  # Both forms of a step are in the code; one of them runs.
  assert bundles_of(kernel(18000, int(least) // 2)) == steps * 9000
  # Never less than the products take.
  assert bundles_of(kernel(7000, int(least) // 4)) == steps * least


def bundles_of(kernel):
  return kernels_products._bundles(kernel, (512, 1024, 1024), 4 * 128 * 128)


@pytest.mark.parametrize("way", list(kernels_products.WAYS)[:4])
def test_ways_give_what_they_say(way):
  function, types = kernels_products.WAYS[way]
  # Traced, not run: these are real sizes.
  if way[1].startswith("megablox"):
    found = jax.eval_shape(function, *types)
  else:
    found = jax.tree.leaves(jax.eval_shape(function, *types))[0]
  rows, width = kernels_products.ROWS, kernels_products.WIDTH
  hidden = kernels_products.HIDDEN
  of_matrices = (kernels_products.EXPERTS, width, hidden)
  wanted = (rows, hidden) if way[0] == "rows" else of_matrices
  assert found.shape == wanted


def test_a_mistake_takes_one_line():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.kernels_products", "--platform=cpu"],
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: --platform=cpu must be tpu:")
