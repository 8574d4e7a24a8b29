"""Trains one stage; a run that was stopped goes on where it stood.

python -m experiments.train --config=configs/tiny.py:pretrain --workdir=DIR

Variants of a config: pretrain, dense_warmup, sparse, sft. A later stage starts
from an earlier one's weights with --config.init_from=EARLIER/checkpoints.
"""

from absl import flags

from dsv32_jax import config_files
from dsv32_jax.training import loop
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()


def main(argv):
  del argv
  config = config_files.build(run.TrainConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  try:
    finished = loop.train(config, workdir)
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return
  print(f"{workdir}: {int(finished.state.step)} steps done")


if __name__ == "__main__":
  common.run(main)
