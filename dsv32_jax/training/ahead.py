"""A stage's step compiled ahead of time, for devices that need not exist."""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.training import flops
from dsv32_jax.training import hlo
from dsv32_jax.training import jaxpr_flops
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run
from dsv32_jax.training import step as step_lib

# A tenth of a device's memory is left for what the compiler does not count.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiled step needs.

  Attributes:
    devices: JAX devices of the mesh.
    argument_bytes_per_device: parameters, optimiser state and batch.
    temporary_bytes_per_device: what the step allocates beside them.
    peak_bytes_per_device: the most that is alive at once, arguments included.
    model_flops_per_step: see `flops`.
    flops_by_part: the same by what they are spent on.
    global_batch: sequences of a step.
    sequence_length: tokens of a sequence.
    compile_seconds: of tracing, lowering and compiling.
    program_flops_per_step: of the matrix products that the program runs,
      recomputation and padding included; see `jaxpr_flops`.
    sorts: sort instructions in the compiled program.
    collectives: instructions by kind, in the program's text.
    collective_bytes_per_device: what they leave in a device's memory in a step,
      by kind, loops multiplied out.
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
  program_flops_per_step: float
  sorts: int
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


def compile_step(config: run.TrainConfig, devices) -> tuple[Report, object]:
  """Compiles one whole optimiser step of a stage.

  Args:
    config: the stage; its mesh must fit the devices.
    devices: of this process or of a topology description.

  Returns:
    The report and the compiled step.

  Raises:
    ValueError: if the mesh does not fit the devices, or the sequences of a
      microbatch do not divide over it.
    DoesNotFit: if the step needs more memory than a device has.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  _check_batch(config, mesh)
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    graph, state = run.abstract_state(config, mesh)
    step = step_lib.make_step(
      graph,
      config.stage,
      optimizer_lib.make_optimizer(config.optimizer),
      microbatches=config.microbatches,
      remat=run.REMAT[config.remat],
    )
    try:
      traced = step.trace(state, abstract_batch(config, mesh))
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      raise _explained(error) from error
  seconds = time.perf_counter() - started
  return _report(config, mesh, traced, compiled, seconds), compiled


def abstract_batch(config: run.TrainConfig, mesh) -> batch_lib.Batch:
  """Describes the global batch of a config on a mesh."""
  shape = (config.data.batch_size, config.data.sequence_length)
  layout = sharding.batch_sharding(mesh, shape)

  def described(dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

  return batch_lib.Batch(
    tokens_BT=described(jnp.int32),
    targets_BT=described(jnp.int32),
    loss_mask_BT=described(jnp.float32),
    segments_BT=described(jnp.int32),
    positions_BT=described(jnp.int32),
  )


def _check_batch(config, mesh):
  """Sequences that do not divide would be held by many devices at once."""
  rows = config.data.batch_size // config.microbatches
  shards = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
  if rows % shards:
    raise ValueError(
      f"a microbatch has {rows} sequences (data.batch_size="
      f"{config.data.batch_size}, microbatches={config.microbatches}), which"
      f" do not divide over the {shards} shards of data x fsdp x expert"
    )


def counts(config: run.TrainConfig) -> dict:
  """Returns what a report says of a step before it is compiled."""
  sequences, length = config.data.batch_size, config.data.sequence_length
  counted = flops.step_flops(config.model, config.stage, sequences, length)
  return {
    "model_flops_per_step": counted.total,
    "flops_by_part": counted._asdict(),
    "global_batch": sequences,
    "sequence_length": length,
  }


def _report(config, mesh, traced, compiled, seconds) -> Report:
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  devices = math.prod(mesh.shape.values())
  traffic = hlo.traffic(text)
  return Report(
    devices=devices,
    argument_bytes_per_device=memory.argument_size_in_bytes,
    temporary_bytes_per_device=memory.temp_size_in_bytes,
    peak_bytes_per_device=memory.peak_memory_in_bytes,
    **counts(config),
    compile_seconds=round(seconds, 1),
    program_flops_per_step=jaxpr_flops.count(traced.jaxpr),
    sorts=hlo.sorts(text),
    collectives=traffic.instructions,
    collective_bytes_per_device=traffic.bytes,
    largest_collectives=traffic.largest,
    open_loops=traffic.open_loops,
    most_gathered=hlo.most_gathered(text, devices),
  )


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
