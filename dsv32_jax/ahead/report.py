"""What a compiled program needs of its devices."""

from collections.abc import Callable
import dataclasses
import re
import time

import jax

from dsv32_jax.ahead import hlo
from dsv32_jax.ahead import jaxpr_flops

# A tenth of a device's memory is left for what the compiler does not count.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiled program needs.

  Attributes:
    devices: JAX devices of the mesh.
    argument_bytes_per_device: what the program is given: parameters, optimiser
      state or cache, and batch.
    temporary_bytes_per_device: what the program allocates beside them.
    peak_bytes_per_device: the most that is alive at once, arguments included.
    model_flops_per_step: what the mathematics asks for; see `model.flops`.
    flops_by_part: the same by what they are spent on.
    global_batch: sequences of a step.
    sequence_length: tokens of a sequence.
    compile_seconds: of tracing, lowering and compiling.
    processor_seconds: that all cores spent on them.
    program_flops_per_step: of the matrix products that the program runs,
      recomputation and padding included; see `jaxpr_flops`.
    sorts: sort instructions in the compiled program.
    most_sorted: entries of the largest of them.
    collectives: instructions by kind, in the program's text.
    collective_bytes_per_device: what a device receives by them in a step, by
      kind, loops multiplied out; see `hlo.Traffic`.
    largest_collectives: (kind, result and operation; bytes), the most first.
    open_loops: loops around a collective that turn as often as the data need,
      counted once: the rounds of the expert exchange.
    most_gathered: devices that the widest all-gather joins; where those are
      all of them, an array is held whole everywhere.
  """

  devices: int
  argument_bytes_per_device: int
  temporary_bytes_per_device: int
  peak_bytes_per_device: int
  model_flops_per_step: float
  flops_by_part: dict[str, float]
  global_batch: int
  sequence_length: int
  compile_seconds: float
  processor_seconds: float
  program_flops_per_step: float
  sorts: int
  most_sorted: int
  collectives: dict[str, int]
  collective_bytes_per_device: dict[str, int]
  largest_collectives: list[tuple[str, int]]
  open_loops: int
  most_gathered: int


class DoesNotFit(ValueError):
  """The compiler ran out of the device's memory.

  Attributes:
    needed_bytes: of temporary memory, or None if the compiler does not say.
  """

  def __init__(self, message: str, needed_bytes: int | None = None):
    super().__init__(message)
    self.needed_bytes = needed_bytes


def compile_program(
  trace: Callable[[], object], devices: int, counts: dict
) -> tuple[Report, object]:
  """Compiles a program and reports on it.

  Args:
    trace: returns the traced `jax.jit` function; run under the program's mesh.
    devices: of the mesh.
    counts: `model_flops_per_step`, `flops_by_part`, `global_batch` and
      `sequence_length` of the report.

  Returns:
    The report and the compiled program.

  Raises:
    DoesNotFit: if it needs more memory than a device has.
  """
  started = time.perf_counter(), time.process_time()
  try:
    traced = trace()
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    raise _explained(error) from error
  seconds = time.perf_counter() - started[0]
  processor = time.process_time() - started[1]
  memory, text = compiled.memory_analysis(), compiled.as_text()
  traffic, sorts = hlo.traffic(text, devices), hlo.sorts(text)
  return Report(
    devices=devices,
    argument_bytes_per_device=memory.argument_size_in_bytes,
    temporary_bytes_per_device=memory.temp_size_in_bytes,
    peak_bytes_per_device=memory.peak_memory_in_bytes,
    **counts,
    compile_seconds=round(seconds, 1),
    processor_seconds=round(processor, 1),
    program_flops_per_step=jaxpr_flops.count(traced.jaxpr),
    sorts=len(sorts),
    most_sorted=max(sorts, default=0),
    collectives=traffic.instructions,
    collective_bytes_per_device=traffic.bytes,
    largest_collectives=traffic.largest,
    open_loops=traffic.open_loops,
    most_gathered=hlo.most_gathered(text, devices),
  ), compiled


def _explained(error):
  """Turns the compiler's out-of-memory into one line; else keeps the error."""
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text:
    return error
  found = re.search(r"\(([\d.]+)G\) exceeds available HBM \((\S+)\)", text)
  if found is None:
    return DoesNotFit(text.splitlines()[0])
  needed = float(found[1])
  return DoesNotFit(
    f"needs {needed}G of a device's {found[2]}", int(needed * 2**30)
  )
