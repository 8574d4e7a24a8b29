"""Compiles one problem for a device that is not there, for experiments.kernels.

python -m experiments.kernels_compile ROW, a process of its own: the compiler
reads where to dump when it starts. ROW is JSON: operation, case, dtype,
direction, implementation, platform, shapes, folder. Prints a JSON line.
"""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels import cases
from pallas_kernels import checking
from pallas_kernels import gpu_compile
from pallas_kernels import problems
from pallas_kernels import roofline
from pallas_kernels import schedule
from pallas_kernels import schedule_gpu

# Shorter loops of machine code wait for a barrier.
SHORTEST_LOOP = 16


def find(table, operation: str, name: str) -> cases.Case:
  """Finds a case by its names."""
  return next(c for c in table if (c.operation, c.name) == (operation, name))


def compile_tpu(function, arrays, topology: str, folder) -> dict[str, Any]:
  """Compiles for a TPU; the schedules of its kernels are read from a folder."""
  described = topologies.get_topology_desc(
    topology_name=topology, platform="tpu"
  )
  sharding = jax.sharding.SingleDeviceSharding(described.devices[0])
  arrays = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
  )
  compiled = jax.jit(function).lower(arrays).compile()
  kernels = schedule.read_folder(pathlib.Path(folder))
  return {
    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "kernels": [_tpu_kernel(kernel) for kernel in kernels],
  }


def _tpu_kernel(kernel: schedule.Kernel) -> dict[str, Any]:
  loops = [
    {
      "depth": depth,
      "bundles": loop.bundles,
      "trips": loop.trips,
      "step": loop.step,
      "mxu_least": loop.least,
      "shares": {k: round(v, 4) for k, v in loop.shares.items()},
    }
    for depth, loop in kernel.every_loop()
  ]
  return {
    "name": kernel.name,
    "bundles": kernel.bundles,
    "tile": kernel.tile,
    "executed": kernel.executed,
    "loops": loops,
  }


def minimum(case, direction: str, generation: str, kernels) -> dict[str, Any]:
  """Returns the fewest bundles of the matrix products, and their share.

  All pairs of queries and keys count, as the static schedule takes each tile.
  """
  plain, padded = (
    roofline.mxu_bundles(case, direction, generation, padded)
    for padded in (False, True)
  )
  counts = [kernel["executed"] for kernel in kernels]
  executed = sum(counts) if None not in counts else None
  return {
    "executed": executed,
    "mxu_minimum": plain,
    "mxu_minimum_padded": padded,
    "share_of_minimum": executed and plain / executed,
    "share_of_padded": executed and padded / executed,
  }


def compile_gpu(function, arrays, target: str, folder) -> dict[str, Any]:
  """Compiles for a GPU and reads the machine code of its kernels."""
  compiled, kernels = gpu_compile.compile_for(
    function, arrays, target=target, folder=folder
  )
  return {
    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "kernels": [
      _gpu_kernel(index, kernel) for index, kernel in enumerate(kernels)
    ],
  }


def _gpu_kernel(index: int, kernel: gpu_compile.Kernel) -> dict[str, Any]:
  loops = [
    loop
    for loop in schedule_gpu.loops(kernel.sass)
    if loop.instructions >= SHORTEST_LOOP
  ]
  return {
    "name": f"kernel_{index}",
    "tile": max((loop.instructions for loop in loops), default=0),
    "registers": kernel.registers,
    "highest_register": kernel.highest_register(),
    "shared_bytes": kernel.shared_bytes,
    "spill_bytes": kernel.spill_bytes,
    "spill_instructions": schedule_gpu.spill_instructions(kernel.sass),
    "warnings": list(kernel.warnings),
    "opcodes": kernel.opcodes(),
    "loops": [
      {"instructions": loop.instructions, "opcodes": loop.opcodes}
      for loop in loops
    ],
  }


def main():
  row = json.loads(sys.argv[1])
  case = find(cases.BENCHMARKS[row["shapes"]], row["operation"], row["case"])
  reason = checking.refusal(case, row["dtype"], row["implementation"])
  if reason is not None:
    print(json.dumps({"skipped": reason}))
    return
  run = problems.call if row["direction"] == "forward" else checking.outputs
  function = functools.partial(run, case, row["implementation"])
  arrays = problems.shapes(case, row["dtype"])
  kind, target = row["platform"].split(":", 1)
  compiles = {"tpu": compile_tpu, "gpu": compile_gpu}
  found = compiles[kind](function, arrays, target, row["folder"])
  generation = target.split(":")[0].removeprefix("tpu")
  if generation in roofline.MXU:
    found |= minimum(case, row["direction"], generation, found["kernels"])
  print(json.dumps(found))


if __name__ == "__main__":
  main()
