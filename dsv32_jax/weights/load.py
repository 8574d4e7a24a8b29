"""Reading a Hugging Face checkpoint into a model.

Everything that can be wrong with the files' headers is found before a byte
is allocated. Then one tensor after the other is read, dequantised, cast and
laid out where the model's sharding wants it; the host never holds more than
about one tensor.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import os

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding as sharding_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import transformer
from dsv32_jax.weights import blocks
from dsv32_jax.weights import folder
from dsv32_jax.weights import hf_config
from dsv32_jax.weights import names
from dsv32_jax.weights import safetensors
from dsv32_jax.weights import shards

_CHUNK_BYTES = 1 << 26
_PLAIN = ("BF16", "F32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A checkpoint folder whose headers were found to be in order.

  Attributes:
    path: the folder.
    config: the model; num_mtp_layers is 1 if the MTP tensors are there.
    entries: tensors by name, block scales included.
    is_dense: there are no indexers (`deepseek_v3`); they will be fresh.
  """

  path: str
  config: config_lib.ModelConfig
  entries: Mapping[str, safetensors.Entry]
  is_dense: bool


def open_hf(path) -> Checkpoint:
  """Opens a Hugging Face checkpoint and checks every header against config.

  Raises:
    ValueError: naming file and tensor or field, for anything missing,
      unexpected or of a wrong shape or type.
  """
  path = os.fspath(path)
  config_path, values = folder.read_config(path)
  hf = hf_config.parse(values, config_path)
  entries = {
    name: entry
    for name, entry in folder.open_tensors(path).items()
    if not name.endswith(names.IGNORED_SUFFIX)
  }
  has_mtp = _has_mtp(entries, hf.model.num_layers)
  config = dataclasses.replace(hf.model, num_mtp_layers=int(has_mtp))
  lacks_indexer = hf.is_dense and not any(
    names.INDEXER in name for name in entries
  )
  expected = set()
  for row in names.tensors(config):
    if lacks_indexer and names.INDEXER in row.name:
      continue
    if row.name not in entries:
      raise ValueError(f"{path}: tensor {row.name!r} is missing")
    expected |= _check(row, entries, hf, config_path)
  for name, entry in entries.items():
    if name not in expected:
      raise ValueError(f"{entry.path}: unexpected tensor {name!r}")
  return Checkpoint(
    path=path, config=config, entries=entries, is_dense=lacks_indexer
  )


def _has_mtp(entries: Mapping[str, safetensors.Entry], num_layers: int) -> bool:
  """Tells whether tensors of a layer past the last are there."""
  found = False
  for name, entry in entries.items():
    if not name.startswith(names.LAYER_PREFIX):
      continue
    number = name[len(names.LAYER_PREFIX) :].split(".")[0]
    if number.isascii() and number.isdigit() and len(number) < 10:
      if int(number) > num_layers:
        raise ValueError(
          f"{entry.path}: tensor {name!r}: only one layer may follow "
          f"num_hidden_layers={num_layers}"
        )
      found |= int(number) == num_layers
  return found


def _check(
  row: names.Tensor,
  entries: Mapping[str, safetensors.Entry],
  hf: hf_config.HfConfig,
  config_path: str,
) -> set[str]:
  """Checks one tensor's header, and its scales'; returns their names."""
  entry = entries[row.name]
  where = f"{entry.path}: tensor {row.name!r}"
  if entry.spec.shape != row.shape:
    raise ValueError(
      f"{where} has shape {list(entry.spec.shape)}, {list(row.shape)} was "
      f"expected from {config_path}"
    )
  if entry.spec.dtype in _PLAIN:
    return {row.name}
  if entry.spec.dtype != "F8_E4M3" or not row.may_be_fp8:
    allowed = [*_PLAIN, "F8_E4M3"] if row.may_be_fp8 else list(_PLAIN)
    raise ValueError(f"{where} is {entry.spec.dtype}, not one of {allowed}")
  if not hf.is_fp8:
    raise ValueError(
      f"{where} is F8_E4M3 and {config_path} has no quantization_config"
    )
  if row.scale_name not in entries:
    raise ValueError(f"{where} is F8_E4M3 and {row.scale_name!r} is missing")
  scale = entries[row.scale_name]
  wanted = safetensors.Spec(dtype="F32", shape=row.scale_shape)
  if scale.spec != wanted:
    raise ValueError(
      f"{scale.path}: tensor {row.scale_name!r} is {scale.spec.dtype} "
      f"{list(scale.spec.shape)}, not F32 {list(wanted.shape)}"
    )
  return {row.name, row.scale_name}


def load_hf(
  path,
  *,
  dtype=jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
  indexer_seed: int = 0,
  progress: Callable[[Iterable], Iterable] = iter,
) -> transformer.Transformer:
  """Loads a Hugging Face checkpoint, straight into its sharding.

  Args:
    path: folder with config.json and safetensors files, `deepseek_v32` or
      dense `deepseek_v3`; F32, BF16 or block-scaled F8_E4M3 weights.
    dtype: type of the parameters; router biases and the indexers' key norms
      are float32 whatever it is.
    mesh: where the parameters go; None for the default device.
    indexer_seed: of the fresh indexers of a dense checkpoint.
    progress: wraps the list of tensors, for example `tqdm.tqdm`.

  Returns:
    The model, with an MTP module if the checkpoint has one.

  Raises:
    ValueError: one line that names the file and the tensor or field.
  """
  checkpoint = open_hf(path)
  graph, state = nnx.split(
    nnx.eval_shape(
      lambda: transformer.Transformer(
        checkpoint.config, rngs=nnx.Rngs(0), dtype=dtype
      )
    )
  )
  fillers = _fillers(state, mesh)
  for row in progress(list(names.tensors(checkpoint.config))):
    if row.copy_of is not None:
      _check_copy(checkpoint.entries[row.name], checkpoint.entries[row.copy_of])
      continue
    _fill(row, fillers, _reader(row, checkpoint, indexer_seed))
  filled = [
    (path, variable.replace(fillers[path].array()))
    for path, variable in nnx.to_flat_state(state)
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def _fillers(state, mesh) -> dict[tuple[str, ...], shards.Filler]:
  """Makes an empty array for each variable of an abstract state."""
  if mesh is None:
    device = jax.config.jax_default_device or jax.local_devices()[0]
    layout = jax.sharding.SingleDeviceSharding(device)
    layouts = {path: layout for path, _ in nnx.to_flat_state(state)}
  else:
    layouts = dict(
      nnx.to_flat_state(sharding_lib.parameter_shardings(state, mesh))
    )
  return {
    path: shards.Filler(variable.shape, variable.dtype, layouts[path])
    for path, variable in nnx.to_flat_state(state)
  }


# Reads rows first to last - 1 of a tensor, float32 or as stored.
_Reader = Callable[[int, int], np.ndarray]


def _reader(row: names.Tensor, checkpoint: Checkpoint, seed: int) -> _Reader:
  """Returns what gives a tensor's rows: the file, or a fresh indexer."""
  if row.name not in checkpoint.entries:
    fresh = _fresh_indexer(row, checkpoint.config, seed)
    return lambda first, last: fresh[first:last]
  entry = checkpoint.entries[row.name]
  if entry.spec.dtype != "F8_E4M3":
    return entry.read_rows
  scale_entry = checkpoint.entries[row.scale_name]
  scale = scale_entry.read()
  if not (np.isfinite(scale).all() and (scale > 0).all()):
    raise ValueError(
      f"{scale_entry.path}: tensor {row.scale_name!r} has a scale that is not "
      "positive and finite"
    )
  return lambda first, last: blocks.dequantize(
    entry.read_rows(first, last), scale, first
  )


def _fresh_indexer(
  row: names.Tensor, config: config_lib.ModelConfig, seed: int
) -> np.ndarray:
  """Initialises an indexer's tensor: normal, but for its LayerNorm."""
  if row.name.endswith("k_norm.weight"):
    return np.ones(row.shape, np.float32)
  if row.name.endswith("k_norm.bias"):
    return np.zeros(row.shape, np.float32)
  # The name in the seed: the same weights whatever the order of reading.
  generator = np.random.default_rng([seed, *row.name.encode()])
  fresh = generator.standard_normal(row.shape, np.float32)
  return fresh * np.float32(config.initializer_scale)


def _fill(
  row: names.Tensor,
  fillers: Mapping[tuple[str, ...], shards.Filler],
  read: _Reader,
) -> None:
  """Reads the rows of one tensor that devices here need, and places them."""
  pieces = []
  for part in row.parts:
    filler = fillers[part.path]
    assert filler.shape[len(part.index) :] == row.slot_shape(part), part
    for piece in filler.wanted(part.index):
      pieces.append((part, piece, _in_view(row, part, piece)))
  if not pieces:
    return
  first = min(view[0].start for _, _, view in pieces)
  last = max(view[0].stop for _, _, view in pieces)
  step = row.rows_per_step
  rows = read(first * step, last * step)
  rows = rows.reshape((last - first, *row.view[1:]))
  for part, piece, view in pieces:
    filler = fillers[part.path]
    within = slice(view[0].start - first, view[0].stop - first)
    block = rows[(within, *view[1:])].transpose(row.order)
    block = np.ascontiguousarray(block, filler.dtype)
    filler.fill(part.index, piece, block)
    filler.wait()


def _in_view(
  row: names.Tensor, part: names.Part, piece: shards.Slices
) -> shards.Slices:
  """Turns a piece of a slot into slices of the tensor's view."""
  view = [slice(0, size) for size in row.view]
  for axis, found in zip(row.order, piece):
    view[axis] = found
  if part.window is not None:
    offset = part.window[0]
    view[1] = slice(view[1].start + offset, view[1].stop + offset)
  return tuple(view)


def _check_copy(copy: safetensors.Entry, original: safetensors.Entry) -> None:
  """Checks that an MTP layer's copy equals what this model shares.

  Raises:
    ValueError: it differs.
  """
  num_rows = copy.spec.shape[0]
  step = max(1, _CHUNK_BYTES * num_rows // max(1, copy.spec.num_bytes))
  for first in range(0, num_rows, step):
    last = min(first + step, num_rows)
    pair = copy.read_rows(first, last), original.read_rows(first, last)
    same = [rows.astype(np.float32).view(np.uint32) for rows in pair]
    if not np.array_equal(*same):
      raise ValueError(
        f"{copy.path}: tensor {copy.name!r} differs from {original.name!r}, "
        "with which this model shares it"
      )


def abstract_hf(path, *, dtype=jnp.float32):
  """Describes the model of a checkpoint, without reading its weights.

  Returns:
    Its ModelConfig and the model with shapes for arrays.

  Raises:
    ValueError: as `load_hf` does for what headers and config show.
  """
  config = open_hf(path).config
  return config, nnx.eval_shape(
    lambda: transformer.Transformer(config, rngs=nnx.Rngs(0), dtype=dtype)
  )
