"""Distils specialists: their answers, rejected by verifiers, as one data set.

python -m experiments.distill --config=configs/distill.py --workdir=DIR

sft.jsonl is for fine-tuning: a source of kind "jsonl" with pieces_field
"pieces". rejections.jsonl tells why each other answer is not in it, report.json
counts both. A specialist whose samples are there already is not asked again.
"""

import functools
import pathlib

from absl import flags
import tqdm

from dsv32_jax import config_files
from dsv32_jax.distillation import config as config_lib
from dsv32_jax.distillation import distill
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import run_folder
from experiments import common

common.define_common_flags()


def main(argv):
  del argv
  config = config_files.build(config_lib.DistillConfig, flags.FLAGS.config)
  workdir = pathlib.Path(common.require_workdir())
  run_folder.claim(config, str(workdir), distill.MAY_CHANGE)
  report = distill.distill(
    config,
    workdir,
    model_checkpoint.load_model,
    progress=functools.partial(tqdm.tqdm, unit="specialist"),
  )
  for name, counts in report.items():
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{name}: {told}")
  total = sum(counts["mixed"] for counts in report.values())
  print(f"{workdir / distill.SFT_FILE}: {total} examples")


if __name__ == "__main__":
  common.run(main)
