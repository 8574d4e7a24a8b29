"""A stage under way: model, optimiser, data and folder of one config."""

import dataclasses
import functools
import os
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import config_files
from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.data import pipeline
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import fresh
from dsv32_jax.model import transformer
from dsv32_jax.training import checkpoint as checkpoint_lib
from dsv32_jax.training import held_out as held_out_lib
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import placement
from dsv32_jax.training import run_folder
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib

Remat = Literal["none", "layer", "save_selection", "save_attention"]


def _saving(*names):
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  return functools.partial(jax.checkpoint, policy=policy)


# What a layer keeps for its backward pass, by name.
REMAT = {
  "none": None,
  "layer": jax.checkpoint,
  # What is dear to recompute and small: the selection, and the results of
  # narrow projections, whose weights are then gathered once less.
  "save_selection": _saving("selection", "projection"),
  # And the attention's results: in gathered form a latent for each head.
  "save_attention": _saving("selection", "projection", "attention"),
}


class Stopped(Exception):
  """A run was asked to stop; its state is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One stage of training, whole.

  Attributes:
    model: shape of the model; a checkpoint's own must agree with it.
    stage: what trains on which losses.
    optimizer: AdamW and its schedule.
    data: mixture, packing, tokenizer.
    steps: optimiser steps of the stage.
    mesh: devices along each axis; by default all along data.
    microbatches: pieces of the batch that go through one after the other.
    remat: what a layer keeps for its backward pass.
    parameter_dtype: storage of the weights.
    compute_dtype: activations and matmuls.
    seed: of the fresh weights.
    init_from: folder of checkpoints whose model the stage starts from, or None
      for fresh weights.
    log_every: steps between two rows of metrics.
    checkpoint: when checkpoints are made and which stay.
    held_out: what is measured at each of them; the best are those of lowest
      loss there.
  """

  model: config_lib.ModelConfig
  stage: stages.StageConfig
  optimizer: optimizer_lib.OptimizerConfig
  data: pipeline.DataConfig
  steps: int
  mesh: sharding.MeshConfig = dataclasses.field(
    default_factory=lambda: sharding.MeshConfig(data=-1)
  )
  microbatches: int = 1
  remat: Remat = "none"
  parameter_dtype: Literal["float32", "bfloat16"] = "float32"
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  seed: int = 0
  init_from: str | None = None
  log_every: int = 1
  checkpoint: checkpoint_lib.CheckpointConfig = dataclasses.field(
    default_factory=checkpoint_lib.CheckpointConfig
  )
  held_out: held_out_lib.HeldOutConfig = dataclasses.field(
    default_factory=held_out_lib.HeldOutConfig
  )

  def __post_init__(self):
    for name in ("steps", "microbatches", "log_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if self.data.batch_size % self.microbatches:
      raise ValueError(
        f"microbatches={self.microbatches} does not divide"
        f" data.batch_size={self.data.batch_size}"
      )
    if self.checkpoint.keep_best and not self.held_out.batches:
      raise ValueError(
        f"checkpoint.keep_best={self.checkpoint.keep_best} needs"
        " held_out.batches to compare by"
      )
    if self.data.sequence_length > self.model.max_length:
      raise ValueError(
        f"data.sequence_length={self.data.sequence_length} exceeds"
        f" model.max_length={self.model.max_length}"
      )


class Run:
  """Everything a loop needs; `resume` first, `close` last.

  Attributes:
    config: of the stage.
    mesh: of the devices.
    tokenizer: of the data.
    batches: this process's iterator of batches.
    checkpointer: of the folder's checkpoints.
    graph: structure of the model.
    state: TrainState, None before `resume`.
    step: function from (state, batch) to (state, metrics).
  """

  def __init__(self, config: TrainConfig, workdir):
    """Opens data and checkpoint folder.

    Raises:
      ValueError: if the tokenizer has more ids than the model, or the mesh
        does not fit the devices, or a data source is unusable.
    """
    self.config = config
    self.mesh = sharding.make_mesh(config.mesh)
    self.tokenizer = run_folder.kept_tokenizer(
      workdir,
      lambda: pipeline.make_tokenizer(config.data),
      vocab_size=config.model.vocab_size,
    )
    rows = (config.data.batch_size, config.data.sequence_length)
    self._share = placement.row_share(
      sharding.batch_sharding(self.mesh, rows), rows, jax.process_index()
    )
    self.batches = pipeline.make_batches(
      config.data,
      self.tokenizer,
      process_index=self._share.index,
      process_count=self._share.count,
    )
    self.checkpointer = checkpoint_lib.Checkpointer(
      os.path.join(workdir, "checkpoints"), config.checkpoint
    )
    self._optimizer = optimizer_lib.make_optimizer(config.optimizer)
    self.state = self.graph = self.step = self._measure = None
    self._read_held_out()

  def _read_held_out(self):
    """Deals it out to streams as what is trained on, or it would be other."""
    data = dataclasses.replace(
      self.config.data, streams=self.batches.num_streams
    )
    self._held_out = held_out_lib.read_batches(
      self.config.held_out, data, self.tokenizer, self._share
    )

  def resume(self) -> int:
    """Makes the state: the newest checkpoint's, or that of a beginning.

    Returns:
      The steps already taken.
    """
    config = self.config
    with jax.set_mesh(self.mesh):
      newest = self.checkpointer.latest_step()
      if newest is None:
        self.graph, self.state = placement.first_state(
          first_model(config, self.mesh),
          config.stage,
          self._optimizer,
          self.mesh,
        )
        start = 0
      else:
        self.graph, self.state = abstract_state(config, self.mesh)
        start = self._restore()
      self.step = step_lib.make_step(
        self.graph,
        config.stage,
        self._optimizer,
        microbatches=config.microbatches,
        remat=REMAT[config.remat],
      )
    self._measure = held_out_lib.make_measure(
      self.graph, config.stage, config.microbatches
    )
    return start

  def model(self) -> transformer.Transformer:
    """Puts the model of the present state together."""
    return step_lib.merge_model(self.graph, self.state)

  def place(self, batch: batch_lib.Batch) -> batch_lib.Batch:
    """Lays this process's rows on the mesh as part of the global batch."""
    rows = self.config.data.batch_size
    shape = (rows, *batch.tokens_BT.shape[1:])
    layout = sharding.batch_sharding(self.mesh, shape)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(layout, x, shape), batch
    )

  def held_out_metrics(self) -> dict[str, float] | None:
    """The stage's mean losses on the held-out batches; None without any."""
    if not self._held_out:
      return None
    with jax.set_mesh(self.mesh):
      found = [self._measure(self.state, self.place(x)) for x in self._held_out]
    return held_out_lib.mean(jax.device_get(found))

  def save(self, step: int, loss: float | None = None) -> None:
    """Starts saving the state as a checkpoint of `step`.

    Args:
      step: steps taken.
      loss: on held-out text, or None.

    Raises:
      checkpoint.SaveError: if the disk does not take it.
    """
    self.checkpointer.save(
      step,
      saved_trees(self.graph, self.state),
      model_checkpoint.model_notes(self.model())
      | {"config": config_files.dump(self.config)},
      self.batches.get_state().decode(),
      loss=loss,
    )

  def close(self) -> None:
    """Waits for a save under way; stops the readers."""
    self.batches.close()
    self.checkpointer.close()

  def _restore(self) -> int:
    found = self.checkpointer.restore(saved_trees(self.graph, self.state))
    self.state = restored_state(
      self.graph, self.state, found.trees, self.config.stage
    )
    streams = self.batches.num_streams
    self.batches.set_state(*(x.encode() for x in found.process_notes))
    if self.batches.num_streams != streams:
      self._read_held_out()
    return found.step


def first_model(config, mesh) -> transformer.Transformer:
  """The model a run begins with: a checkpoint's, or a fresh one.

  Args:
    config: with the fields model, init_from, seed and the types.
    mesh: to lay it on.

  Raises:
    ValueError: if the checkpoint's model has another shape.
  """
  dtype = jnp.dtype(config.parameter_dtype)
  compute_dtype = jnp.dtype(config.compute_dtype)
  if config.init_from is not None:
    model = model_checkpoint.load_model(
      config.init_from, dtype=dtype, compute_dtype=compute_dtype, mesh=mesh
    )
    _check_same(config.model, model.config, config.init_from)
    return model
  return fresh.fresh_model(
    config.model,
    seed=config.seed,
    dtype=dtype,
    compute_dtype=compute_dtype,
    mesh=mesh,
  )


def saved_trees(graph, state: step_lib.TrainState) -> dict[str, Any]:
  """What of a state goes into a checkpoint: model, optimiser, counters."""
  return {
    "model": nnx.state(step_lib.merge_model(graph, state)),
    "optimizer": state.optimizer,
    "counters": {"step": state.step},
  }


def restored_state(graph, state, trees, stage) -> step_lib.TrainState:
  """Puts what `saved_trees` named back together.

  Args:
    graph: structure of the model.
    state: TrainState of arrays or shapes.
    trees: as restored.
    stage: StageConfig.
  """
  merged = step_lib.merge_model(graph, state)
  nnx.update(merged, trees["model"])
  _, trained, frozen, bias, rest = stages.partition(merged, stage.trains)
  return step_lib.TrainState(
    trained, frozen, bias, rest, trees["optimizer"], trees["counters"]["step"]
  )


def abstract_state(config: TrainConfig, mesh):
  """Describes a stage's structure and state without allocating anything.

  Returns:
    (graph, TrainState of jax.ShapeDtypeStruct with shardings on the mesh).
  """
  model = fresh.abstract_model(
    config.model,
    dtype=jnp.dtype(config.parameter_dtype),
    compute_dtype=jnp.dtype(config.compute_dtype),
  )
  optimizer = optimizer_lib.make_optimizer(config.optimizer)
  return placement.abstract_state(model, config.stage, optimizer, mesh)


def _check_same(wanted, found, folder: str) -> None:
  """Names the first field in which the checkpoint's model is another.

  Raises:
    ValueError: if there is one that is not merely index_top_k or max_length.
  """
  for field in dataclasses.fields(wanted):
    name = field.name
    if name in ("index_top_k", "max_length", "rope", "initializer_scale"):
      continue
    if getattr(wanted, name) != getattr(found, name):
      raise ValueError(
        f"config.model.{name}={getattr(wanted, name)} but the model in"
        f" init_from={folder} has {getattr(found, name)}"
      )
