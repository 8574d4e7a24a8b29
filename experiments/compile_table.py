"""The 671B model compiled for pods that are not there, as a table.

python -m experiments.compile_table --workdir=DIR --write_to=README.md

Runs `experiments.compile_for` for each of TARGETS, one after the other (five
minutes and 9 GB each on two cores), keeps its report in DIR and reads it from
there the next time. Needs the extras `tpu` and `agents` and no TPU. Of GPUs
there is arithmetic only.
"""

import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

from absl import flags

from experiments import common
from experiments import readme_block

common.define_workdir_flag()
_WRITE_TO = flags.DEFINE_string(
  "write_to", None, "README whose block of results is replaced."
)
_AGAIN = flags.DEFINE_bool("again", False, "Compile what is there already.")

BEGIN, END = "<!-- pods: begin -->", "<!-- pods: end -->"
CONFIG = "configs/deepseek_v32_671b.py"
_GIB = 2**30


class Target(NamedTuple):
  """What to compile.

  Attributes:
    variant: of the 671B config.
    topology: as `compile_for` takes it.
    changes: fields of the config by path.
  """

  variant: str
  topology: str
  changes: dict[str, int]

  @property
  def name(self) -> str:
    return f"{self.variant}-{self.topology.replace(':', '-')}"


def _mesh(microbatches, **axes):
  changes = {f"mesh.{axis}": size for axis, size in axes.items()}
  return changes | {"microbatches": microbatches}


TARGETS = (
  Target("dense_warmup", "v5p:8x8x16", {}),
  Target("sparse", "v5p:8x8x16", {}),
  Target("sparse", "v5p:8x8x8", _mesh(30, fsdp=1, expert=16, context=32)),
  Target("sparse", "v5p:4x8x8", _mesh(60, fsdp=1, expert=8, context=32)),
  Target("sparse", "tpu7x:4x4x8", _mesh(60, fsdp=1, expert=8, context=32)),
  Target("grpo", "v5p:8x8x16", {}),
  Target("prefill", "v5p:4x4x4", {}),
  Target("decode", "v5p:4x4x4", {}),
  # The weights alone take 78 GiB of each of 16 chips.
  Target(
    "decode",
    "v5p:4x4x2",
    {"mesh.expert": 16, "mesh.tensor": 2, "batch_size": 16},
  ),
  # 32 nodes of eight, by arithmetic.
  Target("sparse", "h200:256", _mesh(30, fsdp=2, expert=8, context=16)),
)
_HEAD = (
  "stage",
  "topology",
  "sequences",
  "arguments, GiB a device",
  "peak, of the device's",
  "model PF a step",
  "run, of the model's",
  "collectives, GB a device",
  "compiled in, host",
  "estimate: s a step, MFU",
)


def main(argv):
  del argv
  if _WRITE_TO.value is not None:
    readme_block.split(pathlib.Path(_WRITE_TO.value), BEGIN, END)
  folder = common.require_workdir()
  rows = [row(target, _report(target, folder)) for target in TARGETS]
  table = "\n".join(
    "| " + " | ".join(cells) + " |"
    for cells in (_HEAD, ("---",) * len(_HEAD), *rows)
  )
  print(table)
  if _WRITE_TO.value is not None:
    readme_block.replace(pathlib.Path(_WRITE_TO.value), BEGIN, END, table)


def row(target: Target, report: dict) -> tuple[str, ...]:
  """Returns a report's line of the table."""
  gib = lambda name: f"{report[name] / _GIB:.1f}"
  hbm = f"{report['hbm_bytes_per_device'] / _GIB:.1f}"
  head = (
    target.variant,
    f"{target.topology}, {report['chips']} chips",
    f"{report['global_batch']} x {report['sequence_length']}",
  )
  if "peak_bytes_per_device" not in report:
    return (*head, "", f"does not fit {hbm}", *[""] * 5)
  model = report["model_flops_per_step"]
  if "compile_seconds" not in report:
    run, moved = "by hand", sum(report["bytes_by_axis"].values())
    made = "not compiled"
  else:
    run = f"{report['program_flops_per_step'] / model:.2f}x"
    moved = sum(report["collective_bytes_per_device"].values())
    made = (
      f"{report['compile_seconds']:.0f} s ({report['processor_seconds']:.0f} of"
      f" processor), {gib('host_peak_bytes')} GiB"
    )
  return (
    *head,
    gib("argument_bytes_per_device"),
    f"{gib('peak_bytes_per_device')} of {hbm}",
    _short(model / 1e15),
    run,
    _short(moved / 1e9),
    made,
    f"{_short(report['step_seconds'])} s, {report['mfu']:.0%}",
  )


def _short(number: float) -> str:
  return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _report(target: Target, folder: pathlib.Path) -> dict:
  """Compiles a target, or reads what is known of it."""
  path = folder / f"{target.name}.json"
  if _AGAIN.value or not path.exists():
    print(f"{target.name}: compiling", flush=True)
    made = folder / "new.json"
    command = [
      *(sys.executable, "-m", "experiments.compile_for"),
      f"--config={CONFIG}:{target.variant}",
      f"--topology={target.topology}",
      f"--output={made}",
      *(f"--config.{field}={n}" for field, n in target.changes.items()),
    ]
    # Exit code 2 is a report too: it does not fit.
    if subprocess.run(command, check=False).returncode not in (0, 2):
      raise ValueError(f"{target.name}: {' '.join(command[2:])} failed")
    made.replace(path)
  return json.loads(path.read_text())


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  common.run(main)
