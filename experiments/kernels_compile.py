"""Compiles one problem for a device that is not there, for experiments.kernels.

python -m experiments.kernels_compile ROW, a process of its own: the compiler
reads where to dump when it starts. ROW is JSON: operation, case, dtype,
direction, implementation, platform, shapes, folder, alone. Prints a JSON line.

A TPU kernel is compiled alone, without what XLA does around it, unless `alone`
is false: that takes seconds where the whole program takes minutes. Its schedule
may differ by a percent, so that a budget is for the one or for the other.
"""

import contextlib
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
from pallas_kernels import target

# Shorter loops of machine code wait for a barrier.
SHORTEST_LOOP = 16


def find(table, operation: str, name: str) -> cases.Case:
  """Finds a case by its names."""
  return next(c for c in table if (c.operation, c.name) == (operation, name))


def kernels_of(function, arrays):
  """Returns a function that is the Pallas kernels of another one, and no more.

  Args:
    function: what to look through, loops and branches included.
    arrays: its argument, of which only the types count.

  Returns:
    (kernels, arguments): a function of a list with a list of operands for each
    kernel, and the types of these. What occurs twice is there once.
  """
  found = {}
  for equation in _pallas_calls(jax.make_jaxpr(function)(arrays).jaxpr):
    types = [
      jax.ShapeDtypeStruct(operand.aval.shape, operand.aval.dtype)
      for operand in equation.invars
    ]
    found.setdefault(f"{types} {equation.params}", (equation, types))

  def kernels(arguments):
    results = []
    for (equation, _), operands in zip(found.values(), arguments, strict=True):
      # The compiler calls it by the scope.
      with jax.named_scope(equation.params["name"] or "kernel"):
        results.append(equation.primitive.bind(*operands, **equation.params))
    return results

  return kernels, [types for _, types in found.values()]


def _pallas_calls(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=_is_jaxpr
    ):
      if _is_jaxpr(inner):
        yield from _pallas_calls(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x) -> bool:
  return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def tpu_device(topology: str) -> jax.Device:
  """Returns a device of a topology that need not be there."""
  described = topologies.get_topology_desc(
    topology_name=topology, platform="tpu"
  )
  return described.devices[0]


def compile_tpu(function, arrays, topology: str, folder) -> dict[str, Any]:
  """Compiles for a TPU; the schedules of its kernels are read from a folder."""
  sharding = jax.sharding.SingleDeviceSharding(tpu_device(topology))
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
      "dma": loop.copies,
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
    "kernels": [_gpu_kernel(kernel) for kernel in kernels],
  }


def _gpu_kernel(kernel: gpu_compile.Kernel) -> dict[str, Any]:
  loops = [
    loop
    for loop in schedule_gpu.loops(kernel.sass)
    if loop.instructions >= SHORTEST_LOOP
  ]
  return {
    "name": kernel.name,
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


def run(row) -> dict[str, Any]:
  """Compiles a row and returns what came out, or why it was "skipped"."""
  case = find(cases.BENCHMARKS[row["shapes"]], row["operation"], row["case"])
  whole = problems.call if row["direction"] == "forward" else checking.outputs
  function = functools.partial(whole, case, row["implementation"])
  arrays = problems.shapes(case, row["dtype"])
  kind, where = row["platform"].split(":", 1)
  compiles = {"tpu": compile_tpu, "gpu": compile_gpu}
  aim = contextlib.nullcontext()
  if kind == "tpu":
    aim = target.compiling_for(tpu_device(where))
  try:
    with aim:
      if row["alone"]:
        function, arrays = kernels_of(function, arrays)
      found = compiles[kind](function, arrays, where, row["folder"])
  except ValueError:
    # To ask first would trace everything twice, which takes as long.
    reason = checking.refusal(case, row["dtype"], row["implementation"])
    if reason is None:
      raise
    return {"skipped": reason}
  generation = where.split(":")[0].removeprefix("tpu")
  if generation in roofline.MXU:
    found |= minimum(case, row["direction"], generation, found["kernels"])
  return found


if __name__ == "__main__":
  print(json.dumps(run(json.loads(sys.argv[1]))))
