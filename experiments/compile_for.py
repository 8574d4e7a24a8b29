"""Compiles a stage's step for hardware that is not there, and reports on it.

python -m experiments.compile_for --topology=v5p:8x8x16 \
  --config=configs/deepseek_v32_671b.py:sparse --output=report.json

A TPU topology needs libtpu (the extra `tpu`) and no TPU; cpu:8 compiles for
that many CPU devices. Exit code 2 says that the step compiled, or failed to,
because it does not fit.
"""

from experiments import no_accelerator  # noqa: F401  isort: skip

import dataclasses
import importlib.util
import json
import resource
import sys

from absl import flags
import jax
from jax.experimental import topologies
from ml_collections import config_flags

from dsv32_jax import config_files
from dsv32_jax.training import ahead
from dsv32_jax.training import estimate
from dsv32_jax.training import run
from experiments import common
from pallas_kernels import target

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Generation and shape, as v5p:8x8x16, or cpu:DEVICES."
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the report, JSON.")

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
_DEVICES_PER_CHIP = {"tpu7x": 2}


def main(argv):
  del argv
  if _TOPOLOGY.value is None:
    raise ValueError("--topology is missing")
  if _OUTPUT.value is not None:
    # Minutes of compiling are not to end in a file that cannot be written.
    common.require_writable("output", _OUTPUT.value)
  generation, _, shape = _TOPOLOGY.value.partition(":")
  devices = _devices(generation, shape)
  config = config_files.build(run.TrainConfig, flags.FLAGS.config)
  offered = _KERNELS["cpu" if generation == "cpu" else "tpu"]
  if config.stage.kernels not in offered:
    raise ValueError(
      f"config.stage.kernels={config.stage.kernels!r} cannot be compiled for"
      f" --topology={_TOPOLOGY.value}, only {offered}"
    )
  if generation != "cpu" and config.stage.kernels is None:
    # The default would be that of the machine that compiles.
    stage = dataclasses.replace(config.stage, kernels="tpu")
    config = dataclasses.replace(config, stage=stage)
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
      found, _ = ahead.compile_step(config, devices)
  except ahead.DoesNotFit as error:
    report |= ahead.counts(config) | {
      "temporary_bytes_per_device": error.needed_bytes,
      "fits": False,
      "why": str(error),
    }
  else:
    report |= dataclasses.asdict(found)
    if generation != "cpu":
      name = generation.removeprefix("tpu")
      report |= estimate.estimate(found, name)._asdict()
    report["fits"] = (
      hbm is None or found.peak_bytes_per_device <= ahead.USABLE * hbm
    )
  # The most memory that this process has held.
  held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  report["host_peak_bytes"] = held * 1024
  _show(report)
  if _OUTPUT.value is not None:
    with open(_OUTPUT.value, "w") as file:
      json.dump(report, file, indent=2)
      file.write("\n")
  if not report["fits"]:
    sys.exit(2)


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
