"""A model's parameters in an Orbax checkpoint, its config beside them.

A checkpoint of a training run holds the same: a tree named `model` and the
notes that `model_notes` gives, among others, so that each can be read here.
"""

from collections.abc import Mapping
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import config_files
from dsv32_jax import sharding as sharding_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import transformer
from dsv32_jax.training import checkpoint
from dsv32_jax.weights import folder

TREE = "model"
_CONFIG, _DTYPE = "model_config", "model_dtype"


def model_notes(model: transformer.Transformer) -> dict[str, Any]:
  """Returns what a checkpoint must note to be read without a config file."""
  return {
    _CONFIG: config_files.dump(model.config),
    _DTYPE: np.dtype(model.embed.table.dtype).name,
  }


def save_orbax(model: transformer.Transformer, path) -> None:
  """Writes a model as step 0 of a new checkpoint folder, all or nothing.

  Raises:
    ValueError: the target exists and is not empty.
  """
  with (
    folder.Staged(os.fspath(path)) as staged,
    checkpoint.Checkpointer(staged.path) as checkpointer,
  ):
    checkpointer.save(0, {TREE: nnx.state(model)}, model_notes(model))
    checkpointer.wait()


def _read_notes(path: str, notes: Any) -> tuple[config_lib.ModelConfig, Any]:
  if not isinstance(notes, Mapping) or not {_CONFIG, _DTYPE} <= notes.keys():
    raise ValueError(f"{path}: the checkpoint does not note {_CONFIG}")
  try:
    config = config_files.build(config_lib.ModelConfig, notes[_CONFIG])
  except ValueError as error:
    raise ValueError(f"{path}: {_CONFIG}: {error}") from None
  return config, jnp.dtype(notes[_DTYPE])


def load_orbax(
  path,
  *,
  dtype=None,
  mesh: jax.sharding.Mesh | None = None,
  step: int | None = None,
) -> transformer.Transformer:
  """Loads the model of a checkpoint folder, straight into its sharding.

  Args:
    path: folder of steps.
    dtype: type of the parameters; None for the type they were saved in.
    mesh: where the parameters go; None for the default device.
    step: which step; None for the newest.

  Raises:
    FileNotFoundError: there is no such checkpoint.
    ValueError: it is damaged or does not hold a model.
  """
  path = os.fspath(path)
  with checkpoint.Checkpointer(path, read_only=True) as checkpointer:
    step, notes = checkpointer.read_notes(step)
    config, saved_dtype = _read_notes(path, notes)
    graph, saved = _abstract(config, saved_dtype, mesh)
    state = checkpointer.restore({TREE: saved}, step).trees[TREE]
  if dtype is not None and jnp.dtype(dtype) != saved_dtype:
    graph, wanted = _abstract(config, dtype, mesh)
    state = jax.tree.map(lambda x, y: x.astype(y.dtype), state, wanted)
  return nnx.merge(graph, state)


def _abstract(config: config_lib.ModelConfig, dtype, mesh):
  """Returns a model's graph and its state of shapes with shardings."""
  graph, state = nnx.split(
    nnx.eval_shape(
      lambda: transformer.Transformer(config, rngs=nnx.Rngs(0), dtype=dtype)
    )
  )
  if mesh is None:
    return graph, state
  layouts = sharding_lib.parameter_shardings(state, mesh)
  placed = [
    (
      path,
      variable.replace(
        jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=layout)
      ),
    )
    for (path, variable), (_, layout) in zip(
      nnx.to_flat_state(state), nnx.to_flat_state(layouts)
    )
  ]
  return graph, nnx.from_flat_state(placed)
