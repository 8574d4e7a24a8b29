"""Converts a checkpoint between Hugging Face and Orbax.

python -m experiments.convert --source=DIR --target=DIR --to=orbax|hf|hf_fp8
python -m experiments.convert --source=RUN/checkpoints --step=2000 --to=hf \
  --target=DIR

The source is a Hugging Face folder (it has a config.json; `deepseek_v32`, or
dense `deepseek_v3`, which gets fresh indexers) or a folder of this project's
Orbax checkpoints, of which --step names one. A run may go on meanwhile. The
target must not exist or be empty, and appears when complete.
"""

import functools
import os

from absl import flags
import jax
import jax.numpy as jnp
import tqdm

from dsv32_jax import sharding
from dsv32_jax import weights
from dsv32_jax.training import model_checkpoint
from experiments import common

_SOURCE = flags.DEFINE_string("source", None, "Checkpoint folder to read.")
_TARGET = flags.DEFINE_string("target", None, "Checkpoint folder to write.")
_TO = flags.DEFINE_enum(
  "to",
  None,
  ["orbax", "hf", "hf_fp8"],
  "hf: one type of weights; hf_fp8: what the official checkpoint quantises "
  "in 8 bits with weight_scale_inv, the rest in --save_dtype.",
)
_STEP = flags.DEFINE_string(
  "step", None, "Of an Orbax source: a step or `best`; none: the newest."
)
_SAVE_DTYPE = flags.DEFINE_enum(
  "save_dtype",
  None,
  ["float32", "bfloat16"],
  "Type of the weights written. Default: float32 to Orbax, bfloat16 to HF.",
)
_SEED = flags.DEFINE_integer(
  "indexer_seed", 0, "Seed of the fresh indexers of a dense checkpoint."
)
_SHARD_BYTES = flags.DEFINE_integer(
  "max_shard_bytes",
  5 * 10**9,
  "Most bytes of weights in a file.",
  lower_bound=1,
)


def main(argv):
  del argv
  for flag in (_SOURCE, _TARGET, _TO):
    if flag.value is None:
      raise ValueError(f"--{flag.name} is missing")
  source, target = _SOURCE.value, _TARGET.value
  is_hf = os.path.exists(os.path.join(source, "config.json"))
  if not is_hf and _TO.value == "orbax":
    raise ValueError(f"--source={source} has no config.json to convert from")
  step = _step()
  if is_hf and step is not None:
    raise ValueError(f"--step={step}: --source={source} is a Hugging Face one")
  weights.check_target(target)
  default = "float32" if _TO.value == "orbax" else "bfloat16"
  dtype = jnp.dtype(_SAVE_DTYPE.value or default)
  mesh = None
  # Devices of a CPU share their memory: nothing to spread.
  if len(jax.devices()) > 1 and jax.default_backend() != "cpu":
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=-1))
  show = functools.partial(tqdm.tqdm, unit="tensor")
  # Float8 is quantised from float32: rounding twice would not round right.
  held = dtype if _TO.value != "hf_fp8" else jnp.dtype(jnp.float32)
  if is_hf:
    model = weights.load_hf(
      source,
      dtype=held,
      mesh=mesh,
      indexer_seed=_SEED.value,
      progress=functools.partial(show, desc="read"),
    )
  else:
    model = model_checkpoint.load_model(source, mesh=mesh, step=step)
  if _TO.value == "orbax":
    with weights.Staged(target) as staged:
      model_checkpoint.save_model(model, staged.path)
  else:
    weights.save_hf(
      model,
      target,
      dtype=dtype,
      fp8=_TO.value == "hf_fp8",
      max_shard_bytes=_SHARD_BYTES.value,
      progress=functools.partial(show, desc="write"),
    )
  print(f"{target}: {_TO.value}")


def _step() -> int | str | None:
  """Reads --step.

  Raises:
    ValueError: if it is neither a number nor `best`.
  """
  given = _STEP.value
  if given is None or given == "best":
    return given
  if not given.isascii() or not given.isdigit():
    raise ValueError(f"--step={given} must be a number or `best`")
  return int(given)


if __name__ == "__main__":
  common.run(main)
