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
  real_BT = batch.segments_BT > 0
  segments_BT = batch.segments_BT
  if not stage.separate_documents:
    segments_BT = real_BT.astype(jnp.int32)
  given = dict(
    positions_BT=batch.positions_BT if stage.separate_documents else None,
    segments_BT=segments_BT,
    options=options,
    remat=remat,
  )
  output = model(batch.tokens_BT, with_logits=False, **given)
  parts = [part for part in (output.dense, output.moe) if part is not None]
  loss, metrics = jnp.float32(0.0), {}
  kernel_DV = model.head.kernel[...]
  if stage.lm_weight:
    value, found = losses.lm_loss(
      output.hidden,
      kernel_DV,
      batch.targets_BT,
      batch.loss_mask_BT,
      per.targets,
    )
    loss += stage.lm_weight * value
    metrics |= {"lm_loss": value, **found}
  further = None
  if model.mtp is not None and (stage.mtp_weight or stage.indexer_weight):
    hidden_BTD, further = model.predict_further(
      output, batch.tokens_BT, **given
    )
    parts.append(jax.tree.map(lambda leaf: leaf[None], further))
  if stage.mtp_weight and further is not None:
    value, _ = losses.lm_loss(
      hidden_BTD,
      kernel_DV,
      *losses.mtp_targets(batch.targets_BT, batch.loss_mask_BT),
      per.further_targets,
    )
    loss += stage.mtp_weight * value
    metrics["mtp_loss"] = value
  if stage.indexer_weight:
    kl_LBT = jnp.concatenate([part.kl_BT for part in parts])
    value, found = losses.indexer_loss(kl_LBT, real_BT, per.tokens)
    loss += stage.indexer_weight * value
    metrics |= found
  routed = [part for part in parts if part.balance is not None]
  if routed:
    balance = sum(jnp.sum(part.balance) for part in routed) / per.microbatches
    loss += stage.balance_weight * balance
    metrics["balance_loss"] = balance
    load_LE = jnp.concatenate([part.load_E for part in routed])
  metrics["invalid_rows"] = sum(
    jnp.sum(part.invalid_BT) for part in parts if part.invalid_BT is not None
  ) + jnp.float32(0.0)
  return loss, (metrics | {"loss": loss}, load_LE if routed else None)


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
    per = _denominators(batch, microbatches)

    def loss_of(trained, batch):
      model = merge_model(graph, state._replace(trained=trained))
      return stage_loss(model, batch, stage, per, remat=remat)

    gradients, metrics, load_LE = _accumulate(
      jax.grad(loss_of, has_aux=True), state.trained, batch, microbatches
    )
    updates, optimizer_state = optimizer.update(
      gradients, state.optimizer, state.trained
    )
    trained = optax.apply_updates(state.trained, updates)
    bias = state.router_bias
    if load_LE is not None and stage.router_bias_speed and stage.lm_weight:
      applied = optimizer_state.consecutive_skips == 0
      bias = _move_bias(bias, load_LE, stage.router_bias_speed * applied)
    metrics |= {
      "gradient_norm": optimizer_lib.global_norm(gradients),
      "skipped_steps": optimizer_state.skipped,
      "tokens": per.tokens,
    }
    if load_LE is not None:
      mean_L = jnp.maximum(jnp.mean(load_LE, axis=-1), 1e-9)
      metrics["max_load"] = jnp.max(jnp.max(load_LE, axis=-1) / mean_L)
    state = state._replace(
      trained=trained,
      router_bias=bias,
      optimizer=optimizer_state,
      step=state.step + 1,
    )
    return state, metrics

  return step


def _denominators(batch, microbatches) -> Denominators:
  _, further_BT = losses.mtp_targets(batch.targets_BT, batch.loss_mask_BT)
  return Denominators(
    targets=jnp.maximum(jnp.sum(batch.loss_mask_BT), 1.0),
    further_targets=jnp.maximum(jnp.sum(further_BT), 1.0),
    tokens=jnp.maximum(jnp.sum(batch.segments_BT > 0), 1).astype(jnp.float32),
    microbatches=microbatches,
  )


def _accumulate(gradient, trained, batch, microbatches):
  """Sums gradients (float32), metrics and loads over the microbatches."""
  if microbatches == 1:
    gradients, (metrics, load_LE) = gradient(trained, batch)
    return gradients, metrics, load_LE
  rows = batch.tokens_BT.shape[0]
  if rows % microbatches:
    raise ValueError(f"{rows=} of the batch do not divide by {microbatches=}")

  def cut(x_BT):
    pieces = x_BT.reshape(microbatches, rows // microbatches, *x_BT.shape[1:])
    return sharding.constrain(pieces, None, "batch", "length")

  def one(total, batch):
    gradients, (metrics, load_LE) = gradient(trained, batch)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    found = (gradients, metrics, load_LE)
    return jax.tree.map(jnp.add, total, found), None

  pieces = jax.tree.map(cut, batch)
  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(gradient, trained, first)
  gradients, (metrics, load_LE) = shapes
  zeros = (
    jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), gradients),
    jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics),
    jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), load_LE),
  )
  total, _ = jax.lax.scan(one, zeros, pieces)
  return total


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
