"""The whole recipe on real text, tiny: from no model to a report.

python -m experiments.quickstart --workdir=DIR [--smoke]

Pretrains a dense model on the Python standard library's sources, warms its
indexer up, trains it sparse, trains the controls (random keys, a sliding
window, dense) for as many steps, and measures them all on held-out files. The
report is DIR/report.md and report.json. Called again, it goes on where it
stood.
"""

import os
import pathlib

from absl import flags
import jax
from ml_collections import config_flags

from dsv32_jax import config_files
from dsv32_jax.recipe import config as config_lib
from dsv32_jax.recipe import measure
from dsv32_jax.recipe import report
from dsv32_jax.recipe import sizes
from dsv32_jax.recipe import train
from dsv32_jax.training import run
from experiments import common

_FILE = pathlib.Path(__file__).resolve().parents[1] / "configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file(
  "config", str(_FILE), "File with get_config(), and after a colon its variant."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; made if missing.", required=True
)
_SMOKE = flags.DEFINE_bool(
  "smoke", False, "Minutes instead of ten: the smoke variant of the config."
)


# Tokens of a step below which compiling it takes longer than running it.
_SMALL_STEP = 4096


def prepare_cpu(config: config_lib.RecipeConfig) -> None:
  """Makes each core a CPU device, as many as share the batch evenly.

  Programs this small keep one core busy; devices work side by side. Where
  XLA_FLAGS already says how many devices there are, nothing changes. Steps
  smaller yet run on one device and are compiled in haste.
  """
  if config.batch_size * config.sequence_length < _SMALL_STEP:
    jax.config.update("jax_disable_most_optimizations", True)
    return
  if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  cores = os.cpu_count() or 1
  devices = next(n for n in range(cores, 0, -1) if config.batch_size % n == 0)
  jax.config.update("jax_num_cpu_devices", devices)


def main(argv):
  del argv
  given = _CONFIG.value
  if _SMOKE.value:
    if any(
      name.split(".")[0] == "config" and flags.FLAGS[name].present
      for name in flags.FLAGS
    ):
      raise ValueError(
        "--smoke is --config=configs/quickstart.py:smoke; give that in its"
        " place to change fields of it"
      )
    given = config_files.editable(sizes.smoke())
  config = config_files.build(config_lib.RecipeConfig, given)
  workdir = str(common.require_workdir())
  prepare_cpu(config)
  try:
    train.run_stages(config, workdir)
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return
  results = measure.run(config, workdir)
  summary = report.write(config, workdir, results)
  for name, loss in summary["held_out_loss"].items():
    print(f"held-out loss, {name}: {loss:.4f} nats a token")
  print(os.path.join(workdir, "report.md"))


if __name__ == "__main__":
  common.run(main)
