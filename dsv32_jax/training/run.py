"""Runs a stage: from a config to a trained model in a folder.

The folder gets `checkpoints/`, `config.json`, `tokenizer.json`,
`metrics.jsonl` (same bytes for the same command) and `timings.jsonl`. A run
that was stopped goes on where it stood.
"""

import dataclasses
import json
import os
import time
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import config_files
from dsv32_jax import sharding
from dsv32_jax.data import pipeline
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import transformer
from dsv32_jax.training import checkpoint as checkpoint_lib
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import remat as remat_lib
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One stage of training, whole.

  Attributes:
    model: shape of the model; a checkpoint's own must agree with it.
    stage: what trains on which losses.
    optimizer: AdamW and its schedule.
    data: mixture, packing, tokenizer.
    steps: optimiser steps of the stage.
    mesh: devices along each axis.
    microbatches: pieces of the batch that go through one after the other.
    remat: what a layer keeps for its backward pass.
    parameter_dtype: storage of the weights.
    compute_dtype: activations and matmuls.
    seed: of the fresh weights.
    init_from: folder of checkpoints whose model the stage starts from, or None
      for fresh weights.
    log_every: steps between two rows of metrics.
    checkpoint: when checkpoints are made and which stay.
  """

  model: config_lib.ModelConfig
  stage: stages.StageConfig
  optimizer: optimizer_lib.OptimizerConfig
  data: pipeline.DataConfig
  steps: int
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  microbatches: int = 1
  remat: Literal["none", "layer", "save_attention"] = "none"
  parameter_dtype: Literal["float32", "bfloat16"] = "float32"
  compute_dtype: Literal["float32", "bfloat16"] = "float32"
  seed: int = 0
  init_from: str | None = None
  log_every: int = 1
  checkpoint: checkpoint_lib.CheckpointConfig = dataclasses.field(
    default_factory=checkpoint_lib.CheckpointConfig
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
    if self.data.sequence_length > self.model.max_length:
      raise ValueError(
        f"data.sequence_length={self.data.sequence_length} exceeds"
        f" model.max_length={self.model.max_length}"
      )
