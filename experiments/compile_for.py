"""Compiles a step for hardware that is not there, and reports on it.

The step is that of a config's stage of training, of reinforcement learning (its
config has a `learner`) or of a served model (`new_tokens`).

python -m experiments.compile_for --topology=v5p:8x8x16 \
  --config=configs/deepseek_v32_671b.py:sparse --output=report.json

Needs the extra `agents`: a run of reinforcement learning may name environments.
A TPU topology needs libtpu (the extra `tpu`) and no TPU; cpu:8 compiles for as
many CPU devices; h200:256 compiles nothing and counts by hand what a stage of
training needs of that many GPUs in nodes of eight. Exit code 2 says that the
step compiled, or failed to, because it does not fit.
"""

from experiments import no_accelerator  # noqa: F401  isort: skip

from collections.abc import Callable
import dataclasses
import importlib.util
import json
import pathlib
import resource
import sys
import types
from typing import NamedTuple

from absl import flags
import jax
from jax.experimental import topologies
from ml_collections import config_flags

from dsv32_jax import config_files
from dsv32_jax.ahead import estimate
from dsv32_jax.ahead import report as report_lib
from dsv32_jax.generation import ahead as generation_ahead
from dsv32_jax.rl import ahead as rl_ahead
from dsv32_jax.rl import run_config
from dsv32_jax.training import ahead as training_ahead
from dsv32_jax.training import layout
from dsv32_jax.training import run
from experiments import common
from pallas_kernels import roofline
from pallas_kernels import target

_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Generation and shape, as v5p:8x8x16, or cpu:DEVICES, or h200:DEVICES.",
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the report, JSON.")
_PROGRAM = flags.DEFINE_string(
  "program", None, "File for the compiled program's text."
)

# What a JAX device of each generation offers, as its compiler reports it. A
# 7x chip is two devices.
_GIB = 2**30
_HBM_BYTES = {
  "v5e": 15.75 * _GIB,
  "v5p": 95.74 * _GIB,
  "v6e": 31.25 * _GIB,
  "tpu7x": 94.75 * _GIB,
}
# Implementations that compile there; None is the platform's own.
_KERNELS = {"cpu": (None, "xla", "tpu_interpret"), "tpu": (None, "xla", "tpu")}
_MOST_CPU_DEVICES = 4096
# By arithmetic only; what their makers say, in bytes.
_GPU_BYTES = {"h100": 80e9, "h200": 141e9}
_DEVICES_PER_CHIP = {"tpu7x": 2}


class _Kind(NamedTuple):
  """What a config describes a step of.

  Attributes:
    config: its type.
    ahead: module that compiles it.
    field: path to the name of its kernels.
    kernels: reads that field.
    with_kernels: changes it.
  """

  config: type
  ahead: types.ModuleType
  field: str
  kernels: Callable
  with_kernels: Callable


def _stage_with_kernels(config, kernels):
  stage = dataclasses.replace(config.stage, kernels=kernels)
  return dataclasses.replace(config, stage=stage)


def _learner_with_kernels(config, kernels):
  learner = _stage_with_kernels(config.learner, kernels)
  return dataclasses.replace(config, learner=learner)


# By the field that only such a config has.
_KINDS = {
  "new_tokens": _Kind(
    generation_ahead.ServeConfig,
    generation_ahead,
    "kernels",
    lambda config: config.kernels,
    lambda config, kernels: dataclasses.replace(config, kernels=kernels),
  ),
  "learner": _Kind(
    run_config.RlConfig,
    rl_ahead,
    "learner.stage.kernels",
    lambda config: config.learner.stage.kernels,
    _learner_with_kernels,
  ),
  "stage": _Kind(
    run.TrainConfig,
    training_ahead,
    "stage.kernels",
    lambda config: config.stage.kernels,
    _stage_with_kernels,
  ),
}


def main(argv):
  del argv
  if _TOPOLOGY.value is None:
    raise ValueError("--topology is missing")
  # Minutes of compiling are not to end in a file that cannot be written.
  for flag in (_OUTPUT, _PROGRAM):
    if flag.value is not None:
      common.require_writable(flag.name, flag.value)
  if _OUTPUT.value is not None and _OUTPUT.value == _PROGRAM.value:
    raise ValueError(f"--output and --program are both {_OUTPUT.value}")
  generation, _, shape = _TOPOLOGY.value.partition(":")
  if generation in _GPU_BYTES:
    if _PROGRAM.value is not None:
      raise ValueError(
        f"--program={_PROGRAM.value}: for --topology={_TOPOLOGY.value} nothing"
        " is compiled"
      )
    _finish(_count_for_gpus(generation, shape))
    return
  devices = _devices(generation, shape)
  kind = _kind(flags.FLAGS.config)
  config = config_files.build(kind.config, flags.FLAGS.config)
  offered = _KERNELS["cpu" if generation == "cpu" else "tpu"]
  if kind.kernels(config) not in offered:
    raise ValueError(
      f"config.{kind.field}={kind.kernels(config)!r} cannot be compiled for"
      f" --topology={_TOPOLOGY.value}, only {offered}"
    )
  if generation != "cpu" and kind.kernels(config) is None:
    # The default would be that of the machine that compiles.
    config = kind.with_kernels(config, "tpu")
  hbm = _HBM_BYTES.get(generation)
  report = {
    "topology": _TOPOLOGY.value,
    "chips": len(devices) // _DEVICES_PER_CHIP.get(generation, 1),
    "devices": len(devices),
    "hbm_bytes_per_device": hbm and int(hbm),
  }
  print(f"compiling for {len(devices)} devices of {_TOPOLOGY.value}")
  try:
    with target.compiling_for(devices[0]):
      found, compiled = kind.ahead.compile_step(config, devices)
  except report_lib.DoesNotFit as error:
    report |= kind.ahead.counts(config) | {
      "temporary_bytes_per_device": error.needed_bytes,
      "fits": False,
      "why": str(error),
    }
  else:
    report |= dataclasses.asdict(found)
    if _PROGRAM.value is not None:
      pathlib.Path(_PROGRAM.value).write_text(compiled.as_text())
    if generation != "cpu":
      name = generation.removeprefix("tpu")
      report |= estimate.estimate(found, name)._asdict()
    report["fits"] = (
      hbm is None or found.peak_bytes_per_device <= report_lib.USABLE * hbm
    )
  # The most memory that this process has held.
  held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  report["host_peak_bytes"] = held * 1024
  _finish(report)


def _finish(report):
  """Shows and writes the report; ends the program where it does not fit."""
  _show(report)
  if _OUTPUT.value is not None:
    with open(_OUTPUT.value, "w") as file:
      json.dump(report, file, indent=2)
      file.write("\n")
  if not report["fits"]:
    sys.exit(2)


def _count_for_gpus(generation, shape):
  """The report of a stage on GPUs, nothing compiled."""
  config = flags.FLAGS.config
  if _kind(config).config is not run.TrainConfig:
    raise ValueError(
      f"--topology={_TOPOLOGY.value}: only a stage of training is counted by"
      " hand"
    )
  config = config_files.build(run.TrainConfig, config)
  found = layout.layout(config, roofline.device(generation))
  needed = str(layout.abstract_mesh(config.mesh).size)
  if shape != needed:
    raise ValueError(
      f"--topology={_TOPOLOGY.value}: the mesh is of {needed} devices"
    )
  hbm = int(_GPU_BYTES[generation])
  return {
    "topology": _TOPOLOGY.value,
    "chips": int(shape),
    "devices": int(shape),
    "hbm_bytes_per_device": hbm,
    **training_ahead.counts(config),
    **found._asdict(),
    "fits": found.peak_bytes_per_device <= report_lib.USABLE * hbm,
  }


def _kind(config) -> _Kind:
  for field, kind in _KINDS.items():
    if field in config:
      return kind
  raise ValueError(f"--config has none of the fields {', '.join(_KINDS)}")


def _devices(generation, shape):
  if generation == "cpu":
    return _cpu_devices(shape)
  if generation not in _HBM_BYTES:
    raise ValueError(
      f"--topology={_TOPOLOGY.value}: generation {generation!r} is not cpu or"
      f" one of {', '.join(_HBM_BYTES)}"
    )
  try:
    description = topologies.get_topology_desc(
      topology_name=_TOPOLOGY.value, platform="tpu"
    )
  # Whatever a missing libtpu or a shape it does not know raises.
  except (RuntimeError, ValueError) as error:
    hint = ""
    if importlib.util.find_spec("libtpu") is None:
      hint = " (TPU topologies need the extra `tpu`)"
    raise ValueError(
      f"--topology={_TOPOLOGY.value}: {str(error).splitlines()[0]}{hint}"
    ) from error
  return description.devices


def _cpu_devices(shape):
  if not shape.isdecimal() or not 1 <= int(shape) <= _MOST_CPU_DEVICES:
    raise ValueError(
      f"--topology={_TOPOLOGY.value} must be cpu:DEVICES, at most"
      f" {_MOST_CPU_DEVICES}"
    )
  jax.config.update("jax_num_cpu_devices", int(shape))
  return jax.devices("cpu")


def _show(report):
  """Prints the report for people; the file is for programs."""
  for name, value in report.items():
    if name == "largest_collectives":
      continue
    if isinstance(value, dict):
      value = ", ".join(f"{key} {count:.4g}" for key, count in value.items())
    elif (
      name.endswith(("bytes_per_device", "peak_bytes")) and value is not None
    ):
      value = f"{value / _GIB:.2f} GiB"
    elif isinstance(value, float):
      value = f"{value:.4g}"
    print(f"{name:28s} {value}")
  for what, size in report.get("largest_collectives", ()):
    print(f"{size / 1e9:8.1f} GB {what}")


if __name__ == "__main__":
  if "config" not in flags.FLAGS:
    config_flags.DEFINE_config_file(
      "config", None, "File with get_config(), and after a colon its variant."
    )
    flags.mark_flags_as_required(["config"])
  common.run(main)
