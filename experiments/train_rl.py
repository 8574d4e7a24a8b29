"""GRPO from a checkpoint; a run that was stopped goes on where it stood.

python -m experiments.train_rl --config=configs/rl.py:tiny --workdir=DIR \
  --config.init_from=START/checkpoints \
  --config.tokenizer.path=START/tokenizer.json

Variants of the config: tiny, tiny_async, small; with episodes in environments
calculator, calculator_async, lookups; with both at once mixed, mixed_async;
configs/deepseek_v32_671b.py has grpo. metrics.jsonl has a row a rollout:
reward, KL, entropy, ratios, bytes of replay data a token; timings.jsonl the
seconds of sampling, scoring and learning.
"""

from absl import flags

from dsv32_jax import config_files
from dsv32_jax.rl import loop
from dsv32_jax.rl import run_config
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()


def main(argv):
  del argv
  config = config_files.build(run_config.RlConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  try:
    policy = loop.train(config, str(workdir))
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return
  print(f"{workdir}: {policy.version} rollouts learned")


if __name__ == "__main__":
  common.run(main)
