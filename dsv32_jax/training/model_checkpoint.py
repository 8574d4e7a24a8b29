"""Models and training states in checkpoints: one layout for all programs.

A checkpoint holds the tree `model` (every variable of the nnx module), while a
stage runs also `optimizer`, and in its notes the model's config, so that a
checkpoint alone describes the model.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import config_files
from dsv32_jax import sharding
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import fresh
from dsv32_jax.model import transformer
from dsv32_jax.training import checkpoint as checkpoint_lib


def model_notes(model: transformer.Transformer) -> dict[str, Any]:
  """What a checkpoint says of its model."""
  dtype = model.head.kernel[...].dtype
  return {"model": config_files.dump(model.config), "dtype": dtype.name}


def save_model(model: transformer.Transformer, folder, step: int = 0) -> None:
  """Saves a model alone, and waits until it is on disk.

  Raises:
    ValueError: if the folder already has a checkpoint of this step or later.
  """
  with checkpoint_lib.Checkpointer(folder) as checkpointer:
    checkpointer.save(step, {"model": nnx.state(model)}, model_notes(model))
    checkpointer.wait()


def load_model(
  folder,
  *,
  dtype=None,
  compute_dtype=None,
  mesh=None,
  step: int | str | None = None,
) -> transformer.Transformer:
  """Loads the model of a checkpoint, a stage's or a converted one.

  Args:
    folder: of the checkpoints.
    dtype: type of the parameters; None keeps the checkpoint's. What is always
      float32 stays so.
    compute_dtype: type of the activations; None takes that of the parameters.
    mesh: mesh to lay it on, or None for the first device.
    step: a step, "best" for that of lowest loss, or None for the newest.

  Raises:
    FileNotFoundError: if there is no such checkpoint.
    ValueError: if it is damaged, or holds no model.
  """
  checkpointer = checkpoint_lib.Checkpointer(folder, read_only=True)
  with checkpointer:
    if step == "best":
      step = checkpointer.best_step()
    step, notes = checkpointer.read_notes(step)
    if not isinstance(notes, dict) or not {"model", "dtype"} <= notes.keys():
      raise ValueError(f"checkpoint {folder} step {step} describes no model")
    config = config_files.build(
      config_lib.ModelConfig, notes["model"], f"{folder}: model"
    )
    saved_dtype = jnp.dtype(notes["dtype"])
    abstract = fresh.abstract_model(config, dtype=saved_dtype)
    _, state = nnx.split(abstract)
    target = {"model": sharding.placed(state, mesh)}
    found = checkpointer.restore(target, step)
    state = found.trees["model"]
  dtype = saved_dtype if dtype is None else jnp.dtype(dtype)
  wanted = fresh.abstract_model(
    config, dtype=dtype, compute_dtype=compute_dtype
  )
  graph, abstract_state = nnx.split(wanted)
  state = jax.tree.map(
    lambda x, like: x.astype(like.dtype), state, abstract_state
  )
  return nnx.merge(graph, state)
