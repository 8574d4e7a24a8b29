"""One optimiser step of a stage: forward, losses, gradients, update.

The step is one pure function of (state, batch), jitted with its state
donated. The batch is cut into microbatches along its first axis; their
gradients add up to that of the mean over the whole batch.
"""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.model import moe
from dsv32_jax.model import token_order
from dsv32_jax.model import transformer
from dsv32_jax.training import losses
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import stages

# B batch, T tokens, E experts, L layers, M microbatches


class TrainState(NamedTuple):
  """Everything a step changes or reads.

  Attributes:
    trained: nnx.State of the parameters the stage trains.
    frozen: nnx.State of the others.
    router_bias: nnx.State of the routers' selection biases.
    rest: nnx.State of any other variable.
    optimizer: state of the optimiser, over `trained` only.
    step: int32 steps taken, skipped ones included.
  """

  trained: Any
  frozen: Any
  router_bias: Any
  rest: Any
  optimizer: Any
  step: jax.Array


class Denominators(NamedTuple):
  """What the losses of a step are divided by, over all its microbatches."""

  targets: jax.Array
  further_targets: jax.Array
  tokens: jax.Array
  microbatches: int


def init_state(model, stage: stages.StageConfig, optimizer):
  """Returns (graph, TrainState) of a model at the beginning of a stage."""
  graph, trained, frozen, bias, rest = stages.partition(model, stage.trains)
  state = TrainState(
    trained=trained,
    frozen=frozen,
    router_bias=bias,
    rest=rest,
    optimizer=optimizer.init(trained),
    step=np.zeros((), np.int32),
  )
  return graph, state


def merge_model(graph, state: TrainState) -> transformer.Transformer:
  """Puts the model of a state together."""
  return nnx.merge(
    graph, state.trained, state.frozen, state.router_bias, state.rest
  )


def stage_loss(
  model: transformer.Transformer,
  batch: batch_lib.Batch,
  stage: stages.StageConfig,
  per: Denominators,
  *,
  remat=None,
):
  """The weighted sum of a stage's losses on one microbatch.

  Returns:
    The scalar loss, and (metrics, load_LE): scalars that add up over
    microbatches, and the real tokens each expert of each MoE layer got (the
    multi-token prediction's last), None without MoE layers.
  """
  options = stage.options(model.config)
  order = token_order.balanced(batch.tokens_BT.shape[1])
  if order is not None:
    batch = jax.tree.map(order.apply, batch)
  real_BT = batch.segments_BT > 0
  segments_BT = batch.segments_BT
  if not stage.separate_documents:
    segments_BT = real_BT.astype(jnp.int32)
  given = dict(
    positions_BT=batch.positions_BT if stage.separate_documents else None,
    segments_BT=segments_BT,
    options=options,
    order=order,
    remat=remat,
  )
  output = model(batch.tokens_BT, with_logits=False, **given)
  loss, metrics = jnp.float32(0.0), {}
  if stage.lm_weight:
    value, found = losses.lm_loss(
      output.hidden,
      model.head.kernel[...],
      batch.targets_BT,
      batch.loss_mask_BT,
      per.targets,
    )
    loss += stage.lm_weight * value
    metrics |= {"lm_loss": value, **found}
  further, found, load_LE = further_losses(
    model, output, batch, stage, per, **given
  )
  loss += further
  return loss, (metrics | found | {"loss": loss}, load_LE)


def further_losses(model, output, batch, stage, per, **given):
  """What a stage adds to its main loss: MTP, the indexer's KL, balance.

  Args:
    model: whose forward it was.
    output: of the forward.
    batch: Batch.
    stage: StageConfig.
    per: Denominators.
    **given: to the forward: positions, segments, options, order and remat.

  Returns:
    The weighted sum, its metrics, and load_LE as of `stage_loss`.
  """
  parts = [part for part in (output.dense, output.moe) if part is not None]
  loss, metrics = jnp.float32(0.0), {}
  if model.mtp is not None and (stage.mtp_weight or stage.indexer_weight):
    hidden_BTD, further = model.predict_further(
      output, batch.tokens_BT, **given
    )
    parts.append(jax.tree.map(lambda leaf: leaf[None], further))
    if stage.mtp_weight:
      value, _ = losses.lm_loss(
        hidden_BTD,
        model.head.kernel[...],
        *_mtp_targets(batch, given.get("order")),
        per.further_targets,
      )
      loss += stage.mtp_weight * value
      metrics["mtp_loss"] = value
  if stage.indexer_weight:
    kl_LBT = jnp.concatenate([part.kl_BT for part in parts])
    value, found = losses.indexer_loss(
      kl_LBT, batch.segments_BT > 0, per.tokens
    )
    loss += stage.indexer_weight * value
    metrics |= found
  routed = [part for part in parts if part.balance is not None]
  load_LE = None
  if routed:
    balance = sum(jnp.sum(part.balance) for part in routed) / per.microbatches
    loss += stage.balance_weight * balance
    metrics["balance_loss"] = balance
    load_LE = jnp.concatenate([part.load_E for part in routed])
  metrics["invalid_rows"] = sum(
    jnp.sum(part.invalid_BT) for part in parts if part.invalid_BT is not None
  ) + jnp.float32(0.0)
  return loss, metrics, load_LE


def _mtp_targets(batch, order):
  """The second next tokens and their mask, in the order of the batch."""
  given = batch.targets_BT, batch.loss_mask_BT
  if order is None:
    return losses.mtp_targets(*given)
  return map(order.apply, losses.mtp_targets(*map(order.restore, given)))


# Runs of one shape in one process share what is compiled.
@functools.lru_cache(maxsize=8)
def make_step(
  graph,
  stage: stages.StageConfig,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  remat=None,
):
  """Builds the jitted step.

  Args:
    graph: structure of the model, from init_state.
    stage: what trains on which losses.
    optimizer: as given to init_state.
    microbatches: pieces M the batch is cut into, one after the other.
    remat: rematerialisation of a layer, or None to keep its activations.

  Returns:
    A function from (TrainState, Batch) to (TrainState, metrics); the state is
    donated. A step whose gradient is not finite changes nothing but counters.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, batch: batch_lib.Batch):
    per = denominators(batch, microbatches)

    def loss_of(trained, batch):
      model = merge_model(graph, state._replace(trained=trained))
      return stage_loss(model, batch, stage, per, remat=remat)

    gradients, (metrics, load_LE) = accumulate(
      jax.grad(loss_of, has_aux=True),
      state.trained,
      batch,
      cut_batch,
      microbatches,
    )
    state, found = update(state, gradients, load_LE, stage, optimizer)
    return state, metrics | found | {"tokens": per.tokens}

  return step


def update(
  state: TrainState,
  gradients,
  load_LE,
  stage: stages.StageConfig,
  optimizer: optax.GradientTransformation,
):
  """Takes a step along gradients, and moves the routers' biases.

  Args:
    state: before.
    gradients: like `state.trained`.
    load_LE: real tokens of each expert of each MoE layer, or None.
    stage: StageConfig.
    optimizer: as given to init_state.

  Returns:
    TrainState and metrics.
  """
  updates, optimizer_state = optimizer.update(
    gradients, state.optimizer, state.trained
  )
  metrics = {
    "gradient_norm": optimizer_lib.global_norm(gradients),
    "skipped_steps": optimizer_state.skipped,
  }
  bias = state.router_bias
  if load_LE is not None:
    if stage.router_bias_speed and stage.lm_weight:
      applied = optimizer_state.consecutive_skips == 0
      bias = _move_bias(bias, load_LE, stage.router_bias_speed * applied)
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=-1), 1e-9)
    metrics["max_load"] = jnp.max(jnp.max(load_LE, axis=-1) / mean_L)
  state = state._replace(
    trained=optax.apply_updates(state.trained, updates),
    router_bias=bias,
    optimizer=optimizer_state,
    step=state.step + 1,
  )
  return state, metrics


def denominators(batch, microbatches: int, order=None) -> Denominators:
  """Counts what the losses of a whole batch, in an order, are divided by."""
  _, further_BT = _mtp_targets(batch, order)
  return Denominators(
    targets=jnp.maximum(jnp.sum(batch.loss_mask_BT), 1.0),
    further_targets=jnp.maximum(jnp.sum(further_BT), 1.0),
    tokens=jnp.maximum(jnp.sum(batch.segments_BT > 0), 1).astype(jnp.float32),
    microbatches=microbatches,
  )


def accumulate(gradient, trained, batch, cut, microbatches: int):
  """Sums gradients (float32), metrics and loads over the microbatches.

  Args:
    gradient: of (trained, batch) to (gradients, (metrics, load_LE)), whose
      sums over pieces are those of the whole.
    trained: parameters.
    batch: whole.
    cut: of (batch, microbatches) to pieces with a leading axis M.
    microbatches: pieces M.
  """
  if microbatches == 1:
    return gradient(trained, batch)
  pieces = cut(batch, microbatches)

  def in_float32(found):
    gradients, rest = found
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), rest

  def one(total, piece):
    found = in_float32(gradient(trained, piece))
    return jax.tree.map(jnp.add, total, found), None

  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(lambda *a: in_float32(gradient(*a)), trained, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(one, zeros, pieces)
  return total


def rows_of_piece(rows: int, microbatches: int) -> int:
  """Returns the rows of each of M pieces.

  Raises:
    ValueError: if the rows do not divide.
  """
  if rows % microbatches:
    raise ValueError(f"{rows=} of the batch do not divide by {microbatches=}")
  return rows // microbatches


def cut_rows(x_BTX, microbatches: int):
  """Gives an array [B,...] a leading axis M over pieces of its rows."""
  rows = rows_of_piece(x_BTX.shape[0], microbatches)
  pieces = x_BTX.reshape(microbatches, rows, *x_BTX.shape[1:])
  rest = ("length", None)[: x_BTX.ndim - 1]
  return sharding.constrain(pieces, None, "batch", *rest)


def cut_batch(batch, microbatches: int):
  """Gives every array of a batch a leading axis M over pieces of its rows."""
  return jax.tree.map(lambda x_BT: cut_rows(x_BT, microbatches), batch)


def _move_bias(bias_state, load_LE, speed):
  """Updates every router's bias; the multi-token prediction's load is last.

  Where that module has not run it has no load, and its bias stays.
  """
  flat = nnx.to_flat_state(bias_state)
  layers = max(v.get_value().shape[0] for path, v in flat if "mtp" not in path)

  def move(path, variable):
    load = load_LE[:layers]
    if "mtp" in path:
      if load_LE.shape[0] == layers:
        return variable
      load = load_LE[-1]
    return variable.replace(moe.update_bias(variable.get_value(), load, speed))

  return nnx.from_flat_state([(path, move(path, v)) for path, v in flat])
