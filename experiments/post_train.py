"""The whole of post-training, small: specialists, distillation, mixed RL.

python -m experiments.post_train --config=configs/post_training.py --workdir=DIR

Variants of the config: full, sequential, speciale, small, smoke. A specialist
is made of each domain in each of its modes; --config.rl_order=sequential makes
the last stage one for each group of domains, both does it either way. Writes
DIR/report.md, DIR/report.json and DIR/pass_at_1.png: every model in every
domain and mode. Called again, it goes on where it stood. Compiled programs are
kept in DIR/compiled, or in JAX_COMPILATION_CACHE_DIR where that is set.
"""

import math
import os
import pathlib

from absl import flags
import jax

from dsv32_jax import config_files
from dsv32_jax.evals import plots
from dsv32_jax.recipe import post_training
from dsv32_jax.recipe import post_training_report
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()


def main(argv):
  del argv
  config = config_files.build(
    post_training.PostTrainingConfig, flags.FLAGS.config
  )
  workdir = common.require_workdir()
  keep_compiled(workdir / "compiled")
  try:
    report = post_training.run(config, str(workdir))
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return
  text = post_training_report.describe(config, report)
  folder = pathlib.Path(workdir)
  (folder / "report.md").write_text(text)
  draw(folder / "pass_at_1.png", config, report)
  print(text)


def keep_compiled(folder: pathlib.Path) -> None:
  """Keeps compiled programs in a folder, unless another one is named.

  Parts, and the processes that they run in, want the same programs.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # For processes to come.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def draw(path, config, report: dict) -> None:
  """Plots pass@1 of the stages' models in every domain and mode."""
  groups = {
    # A word a line: there are many.
    name.replace("_", "\n"): {
      stage: (100 * value, math.nan) for stage, value in row.items()
    }
    for name, row in post_training_report.by_stage(config, report).items()
  }
  plots.bars(
    path,
    groups,
    title="Held-out pass@1 after each part of post-training",
    y_label="pass@1, percent",
    from_zero=True,
    digits=0,
  )


if __name__ == "__main__":
  common.run(main)
