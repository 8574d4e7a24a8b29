"""Writing a model as a Hugging Face checkpoint of `deepseek_v32`."""

from collections.abc import Callable, Iterable, Mapping
import os

from flax import nnx
import jax.numpy as jnp
import numpy as np

from dsv32_jax.model import transformer
from dsv32_jax.weights import blocks
from dsv32_jax.weights import folder
from dsv32_jax.weights import hf_config
from dsv32_jax.weights import names
from dsv32_jax.weights import safetensors
from dsv32_jax.weights import shards

_DTYPE_NAMES = {
  np.dtype(jnp.bfloat16): "BF16",
  np.dtype(np.float32): "F32",
}


def save_hf(
  model: transformer.Transformer,
  path,
  *,
  dtype=jnp.bfloat16,
  fp8: bool = False,
  max_shard_bytes: int | None = 5 * 10**9,
  progress: Callable[[Iterable], Iterable] = iter,
) -> None:
  """Writes a model as a Hugging Face checkpoint, one tensor at a time.

  The folder appears when it is complete. Router biases and the indexers' key
  norms are float32, as in the official files.

  Args:
    model: its parameters may be sharded over this process's devices.
    path: a folder that does not exist or is empty.
    dtype: bfloat16 or float32, of everything that is not float8.
    fp8: quantise what the official checkpoint quantises, in 128 x 128 blocks
      with power-of-two scales (`weight_scale_inv`).
    max_shard_bytes: most data in a file; None for a single file.
    progress: wraps the list of tensors, for example `tqdm.tqdm`.

  Raises:
    ValueError: a target that is not empty, another dtype, a model that is
      spread over processes or unstacked, or, in fp8, a weight that is not
      finite.
  """
  if np.dtype(dtype) not in _DTYPE_NAMES:
    raise ValueError(f"{dtype=} must be bfloat16 or float32")
  variables = dict(nnx.to_flat_state(nnx.state(model)))
  rows = list(names.tensors(model.config))
  for row in rows:
    for part in row.parts:
      if part.path not in variables:
        name = ".".join(part.path)
        raise ValueError(f"parameter {name} is missing: an unstacked model?")
  specs = _specs(rows, _DTYPE_NAMES[np.dtype(dtype)], fp8=fp8)
  with folder.Staged(os.fspath(path)) as staged:
    writer = folder.Writer(staged.path, specs, max_shard_bytes)
    for row in progress(rows):
      _write(row, rows, variables, specs, writer)
    writer.finish()
    fields = hf_config.to_fields(
      model.config, dtype=np.dtype(dtype).name, is_fp8=fp8
    )
    folder.write_json(os.path.join(staged.path, "config.json"), fields)


def _specs(
  rows: Iterable[names.Tensor], plain: str, *, fp8: bool
) -> dict[str, safetensors.Spec]:
  """Returns every tensor to write, a float8 weight's scales behind it."""
  specs = {}
  for row in rows:
    kind = "F32" if row.is_float32 else plain
    kind = "F8_E4M3" if fp8 and row.is_fp8 else kind
    specs[row.name] = safetensors.Spec(dtype=kind, shape=row.shape)
    if kind == "F8_E4M3":
      specs[row.scale_name] = safetensors.Spec(
        dtype="F32", shape=row.scale_shape
      )
  return specs


def _write(
  row: names.Tensor,
  rows: Iterable[names.Tensor],
  variables: Mapping[tuple[str, ...], nnx.Variable],
  specs: Mapping[str, safetensors.Spec],
  writer: folder.Writer,
) -> None:
  """Brings one tensor to the host, casts or quantises it, and writes it."""
  source = row
  if row.copy_of is not None:
    source = next(other for other in rows if other.name == row.copy_of)
  array = assemble(source, variables)
  kind = specs[row.name].dtype
  if kind != "F8_E4M3":
    writer.write(row.name, array.astype(safetensors.DTYPES[kind], copy=False))
    return
  try:
    values, scale_inv = blocks.quantize(array)
  except ValueError as error:
    raise ValueError(f"tensor {row.name!r}: {error}") from None
  writer.write(row.name, values)
  writer.write(row.scale_name, scale_inv)


def assemble(
  row: names.Tensor, variables: Mapping[tuple[str, ...], nnx.Variable]
) -> np.ndarray:
  """Builds one Hugging Face tensor from a model's parameters.

  Args:
    row: of the table in names.py, not a copy.
    variables: of a model, by path.

  Returns:
    The tensor in its parameter's type.
  """
  first = variables[row.parts[0].path]
  view = np.empty(row.view, first.dtype)
  # The inverse of `order`: the parameter's axis for each axis of the view.
  inverse = tuple(np.argsort(row.order))
  for part in row.parts:
    value = variables[part.path].get_value()
    slot = shards.read_slot(value, part.index).transpose(inverse)
    if part.window is None:
      view[...] = slot
    else:
      view[:, part.window[0] : part.window[1]] = slot
  return view.reshape(row.shape)
