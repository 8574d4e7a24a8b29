"""A GRPO step compiled ahead of time, for devices that need not exist."""

import math

import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.ahead import report
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import fresh
from dsv32_jax.model import token_order
from dsv32_jax.rl import learner
from dsv32_jax.rl import logprobs
from dsv32_jax.rl import replay
from dsv32_jax.rl import run_config
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import placement
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import step_flops


def compile_step(
  config: run_config.RlConfig, devices
) -> tuple[report.Report, object]:
  """Compiles one optimiser step on a minibatch of the longest rows.

  What the sampler kept is replayed as bits, the larger of its two forms. The
  reference, which is scored apart, is not among the arguments.

  Args:
    config: the run; its mesh must fit the devices.
    devices: of this process or of a topology description.

  Returns:
    The report and the compiled step.

  Raises:
    ValueError: if the mesh does not fit the devices, or the rows of a
      microbatch do not divide over it.
    report.DoesNotFit: if the step needs more memory than a device has.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  rows, shards = config.rows // config.microbatches, sharding.batch_shards(mesh)
  if rows % shards:
    raise ValueError(
      f"a microbatch has {rows} rows (prompts={config.prompts}, group_size="
      f"{config.group_size}, learner.minibatches={config.learner.minibatches},"
      f" microbatches={config.microbatches}), which do not divide over the"
      f" {shards} shards of data x fsdp x expert"
    )
  optimizer = optimizer_lib.make_optimizer(config.optimizer)
  with jax.set_mesh(mesh):
    model = fresh.abstract_model(
      config.model,
      dtype=jnp.dtype(config.parameter_dtype),
      compute_dtype=jnp.dtype(config.compute_dtype),
    )
    graph, state = placement.abstract_state(
      model, config.learner.stage, optimizer, mesh
    )
    step = learner.make_learner_step(
      graph,
      config.learner,
      optimizer,
      microbatches=config.microbatches,
      remat=run_lib.REMAT[config.remat],
    )
    batch = abstract_batch(config, mesh)
    return report.compile_program(
      lambda: step.trace(state, batch), mesh.size, counts(config)
    )


def abstract_batch(config: run_config.RlConfig, mesh) -> replay.ReplayBatch:
  """Describes a minibatch of the longest rows, placed on a mesh."""
  shape = (config.rows, max(config.row_lengths))

  def array(dtype, *more):
    return jax.ShapeDtypeStruct((*shape, *more), dtype)

  def row():
    return jax.ShapeDtypeStruct(shape[:1], jnp.float32)

  def layered(dtype, layers, last):
    return jax.ShapeDtypeStruct((layers, *shape, last), dtype)

  model, learns = config.model, config.learner
  described = replay.ReplayBatch(
    batch=batch_lib.Batch(
      tokens_BT=array(jnp.int32),
      targets_BT=array(jnp.int32),
      loss_mask_BT=array(jnp.float32),
      segments_BT=array(jnp.int32),
      positions_BT=array(jnp.int32),
    ),
    old_logp_BT=array(jnp.float32),
    ref_logp_BT=array(jnp.float32),
    advantages_B=row(),
    kl_weight_B=row(),
    trajectory_B=jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    num_sequences=jax.ShapeDtypeStruct((), jnp.float32),
    kept=_kept(config, array),
    experts_LBTA=_experts(model, learns, layered),
    selection_LBTS=layered(jnp.int32, model.num_layers, model.index_top_k)
    if learns.replay_selection
    else None,
    order=token_order.balanced(shape[1]),
  )
  return jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    described,
    replay.layouts(described, mesh),
  )


def counts(config: run_config.RlConfig) -> dict:
  """Returns what a report says of a step before it is compiled."""
  length = max(config.row_lengths)
  counted = step_flops.count(
    config.model, config.learner.stage, config.rows, length
  )
  return {
    "model_flops_per_step": counted.total,
    "flops_by_part": counted._asdict(),
    "global_batch": config.rows,
    "sequence_length": length,
  }


def _kept(config, array) -> logprobs.KeptSets:
  if not config.learner.keep_sampling_mask:
    return logprobs.KeptSets()
  words = math.ceil(config.model.vocab_size / 32)
  return logprobs.KeptSets(bits_BTW=array(jnp.uint32, words))


def _experts(model: config_lib.ModelConfig, learns, layered):
  if not (learns.keep_routing and model.num_moe_layers):
    return None
  dtype = jnp.uint8 if model.num_experts <= 256 else jnp.uint16
  return layered(dtype, model.num_moe_layers, model.experts_per_token)
