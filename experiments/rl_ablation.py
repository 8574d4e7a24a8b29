"""What each of GRPO's four stabilisers is for: all on, each off, all off.

python -m experiments.rl_ablation --config=configs/rl_ablation.py \
  --config.init_from=SHOWN/seed_0/start/checkpoints \
  --config.tokenizer.path=SHOWN/seed_0/tokenizer.json --workdir=DIR --seeds=3

SHOWN is a folder of experiments.rl_shown. Writes DIR/report.json and a plot of
each of solved answers, KL, entropy, ratios, dropped sequences and gradients.
Called again, it goes on where it stood.
"""

from absl import flags
import numpy as np

from dsv32_jax import config_files
from dsv32_jax.evals import plots
from dsv32_jax.evals import seeds
from dsv32_jax.rl import ablation
from dsv32_jax.rl import run_config
from experiments import common
from experiments import rl_arms

common.define_common_flags()
common.define_seeds_flag()


def draw(workdir, results) -> None:
  """Plots each column over rollouts, the mean over the seeds that are done."""
  for name, unit in ablation.CURVES.items():
    series = {}
    for arm, found in results.items():
      table = np.array([one["curves"][name] for one in found], np.float64)
      # A rollout that was filtered away whole has no step.
      mean = np.nanmean(table, axis=0) if len(table) else table
      shown = ~np.isnan(mean)
      series[arm] = ((1 + np.flatnonzero(shown)).tolist(), mean[shown].tolist())
    plots.lines(
      workdir / f"{name}.png",
      series,
      title=f"GRPO's stabilisers: {name}",
      x_label="rollouts",
      y_label=unit,
      log_y=name in ablation.LEAPING,
    )


def summarize(results) -> dict:
  """Of each arm pass@1, and means over the last quarter of the rollouts."""
  report = {}
  for arm, found in results.items():
    report[arm] = {
      "pass_at_1": {
        "seeds": [one["pass_at_1"] for one in found],
        "mean_and_interval": seeds.mean_and_interval(
          [one["pass_at_1"] for one in found]
        ),
      },
      "seconds": [one["seconds"] for one in found],
    }
    for name in ablation.CURVES:
      report[arm][f"last_{name}"] = [
        _last_quarter(one["curves"][name]) for one in found
      ]
  return report


def _last_quarter(values):
  values = values[-max(1, len(values) // 4) :]
  values = [value for value in values if value is not None]
  return float(np.mean(values)) if values else None


def main(argv):
  del argv
  config = config_files.build(run_config.RlConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  sweep = ablation.sweep(config, common.num_seeds(), str(workdir))
  results = rl_arms.follow(sweep, summarize, workdir)
  if results is None:
    return
  draw(workdir, results)
  for arm, found in summarize(results).items():
    print(f"{arm}: pass@1 {found['pass_at_1']['mean_and_interval']}")
  print(workdir / "report.json")


if __name__ == "__main__":
  common.run(main)
