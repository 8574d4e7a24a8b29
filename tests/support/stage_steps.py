"""One optimiser step of a stage on a tiny model, for tests."""

import dataclasses

from flax import nnx
import jax
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import placement
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib
from tests.support import models

STAGES = {
  "pretrain": stages.PRETRAIN,
  "dense_warmup": stages.DENSE_WARMUP,
  "sparse": dataclasses.replace(stages.SPARSE, router_bias_speed=1e-3),
}


def make_optimizer(peak=1e-3, **changes):
  config = optimizer_lib.OptimizerConfig(
    schedule=schedule.ScheduleConfig(peak=peak), **changes
  )
  return optimizer_lib.make_optimizer(config)


def packed_batch(rows=8, length=32, seed=0) -> batch_lib.Batch:
  """Rows of two documents and a little padding."""
  tokens_BT = np.array(models.random_tokens((rows, length), seed=seed))
  first = np.random.default_rng(seed).integers(4, length - 8, (rows, 1))
  place_T = np.arange(length)
  segments_BT = 1 + (place_T >= first)
  segments_BT = np.where(place_T < length - rows % 3 - 1, segments_BT, 0)
  positions_BT = np.where(place_T < first, place_T, place_T - first)
  return batch_lib.from_packed(
    tokens_BT, np.ones_like(tokens_BT), segments_BT, positions_BT
  )


def one_step(
  stage,
  batch,
  *,
  mesh_config=None,
  steps=1,
  microbatches=1,
  optimizer=None,
  remat=None,
  with_state=True,
  **model_changes,
):
  """Takes steps of a stage from the same fresh model.

  Returns:
    The metrics of the last step and the model's state afterwards, on the host;
    None for the state where it is not wanted, as among several processes.
  """
  mesh_config = mesh_config or sharding.MeshConfig()
  sizes = dataclasses.asdict(mesh_config).values()
  mesh = sharding.make_mesh(
    mesh_config, jax.devices()[: int(np.prod(list(sizes)))]
  )
  optimizer = optimizer or make_optimizer()
  model = models.tiny_model(**model_changes)
  with jax.set_mesh(mesh):
    graph, state = nnx.split(model)
    layout = jax.tree.map(lambda x: x.sharding, sharding.placed(state, mesh))
    # From the host, which may be one of several.
    state = jax.device_put(jax.device_get(state), layout)
    model = nnx.merge(graph, state)
    graph, state = placement.first_state(model, stage, optimizer, mesh)
    step = step_lib.make_step(
      graph, stage, optimizer, microbatches=microbatches, remat=remat
    )
    placed = jax.device_put(
      batch, sharding.batch_sharding(mesh, batch.tokens_BT.shape)
    )
    for _ in range(steps):
      state, metrics = step(state, placed)
    final = None
    if with_state:
      final = nnx.state(step_lib.merge_model(graph, state))
  return jax.device_get(metrics), jax.device_get(final)


def flat(state) -> dict:
  """Path -> array of an nnx state."""
  return {
    path: np.asarray(variable.get_value())
    for path, variable in nnx.to_flat_state(state)
  }
