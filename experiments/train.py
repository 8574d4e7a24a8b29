"""Trains one stage; a run that was stopped goes on where it stood.

python -m experiments.train --config=configs/tiny.py:pretrain --workdir=DIR

On a pod or a cluster that JAX knows, every host runs the same command with
--distributed; elsewhere with --coordinator=HOST:PORT --num_processes=N
--process_id=I.

Variants of a config: pretrain, dense_warmup, sparse, sft. A later stage starts
from an earlier one's weights with --config.init_from=EARLIER/checkpoints.
"""

from absl import flags
import jax

from dsv32_jax import config_files
from dsv32_jax.training import loop
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()
common.define_process_flags()
_PROFILE = flags.DEFINE_bool(
  "profile", False, "Profile three steps, for xprof, in WORKDIR/profile."
)


def main(argv):
  del argv
  common.join_processes()
  config = config_files.build(run.TrainConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  try:
    finished = loop.train(config, workdir, profile=_PROFILE.value)
  except run.Stopped as stopped:
    if jax.process_index() == 0:
      print(f"{stopped}; the same command goes on from there")
    return
  if jax.process_index() == 0:
    print(f"{workdir}: {int(finished.state.step)} steps done")


if __name__ == "__main__":
  common.run(main)
