"""A stage's step compiled ahead of time, for devices that need not exist."""

import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.ahead import report
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import run
from dsv32_jax.training import step as step_lib
from dsv32_jax.training import step_flops


def compile_step(
  config: run.TrainConfig, devices
) -> tuple[report.Report, object]:
  """Compiles one whole optimiser step of a stage.

  Args:
    config: the stage; its mesh must fit the devices.
    devices: of this process or of a topology description.

  Returns:
    The report and the compiled step.

  Raises:
    ValueError: if the mesh does not fit the devices, or the sequences of a
      microbatch do not divide over it.
    report.DoesNotFit: if the step needs more memory than a device has.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  _check_batch(config, mesh)
  with jax.set_mesh(mesh):
    graph, state = run.abstract_state(config, mesh)
    step = step_lib.make_step(
      graph,
      config.stage,
      optimizer_lib.make_optimizer(config.optimizer),
      microbatches=config.microbatches,
      remat=run.REMAT[config.remat],
    )
    batch = abstract_batch(config, mesh)
    return report.compile_program(
      lambda: step.trace(state, batch), mesh.size, counts(config)
    )


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
  shards = sharding.batch_shards(mesh)
  if rows % shards:
    raise ValueError(
      f"a microbatch has {rows} sequences (data.batch_size="
      f"{config.data.batch_size}, microbatches={config.microbatches}), which"
      f" do not divide over the {shards} shards of data x fsdp x expert"
    )


def counts(config: run.TrainConfig) -> dict:
  """Returns what a report says of a step before it is compiled."""
  sequences, length = config.data.batch_size, config.data.sequence_length
  counted = step_flops.count(config.model, config.stage, sequences, length)
  return {
    "model_flops_per_step": counted.total,
    "flops_by_part": counted._asdict(),
    "global_batch": sequences,
    "sequence_length": length,
  }
