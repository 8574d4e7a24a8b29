"""What a length penalty costs and saves: held-out pass@1 and tokens an answer.

python -m experiments.rl_length --config=configs/rl_length.py --workdir=DIR \
  --seeds=3

Each seed fine-tunes a fresh tiny model on problems solved step by step or in
one step, and goes on from there with GRPO, once without the penalty and once
with it. Writes DIR/report.json, DIR/pass_at_1.png and DIR/answer_tokens.png.
Called again, it goes on where it stood.
"""

from absl import flags

from dsv32_jax import config_files
from dsv32_jax.evals import plots
from dsv32_jax.evals import seeds
from dsv32_jax.rl import length_study
from experiments import common
from experiments import rl_arms

common.define_common_flags()
common.define_seeds_flag()
# Column -> its title, its unit and what it is multiplied by.
_SHOWN = {
  "pass_at_1": ("Held-out pass@1", "pass@1, percent", 100),
  "answer_tokens": ("Length of held-out answers", "tokens an answer", 1),
}


def draw(workdir, results) -> None:
  """Plots each column of each arm and seed over rollouts."""
  for name, (title, unit, factor) in _SHOWN.items():
    series, kinds = {}, {}
    for arm, found in results.items():
      for seed, one in enumerate(found):
        line = f"{arm}, seed {seed}"
        kinds[line] = arm
        series[line] = (
          [point["version"] for point in one["held_out"]],
          [factor * point[name] for point in one["held_out"]],
        )
    plots.lines(
      workdir / f"{name}.png",
      series,
      title=f"{title} with and without a length penalty",
      x_label="rollouts learned",
      y_label=unit,
      markers=True,
      from_zero=True,
      kinds=kinds,
    )


def summarize(results) -> dict:
  """Of each arm the last evaluation, and mean and half of its interval."""
  report = {}
  for arm, found in results.items():
    report[arm] = {"seconds": [one["seconds"] for one in found]}
    for name in _SHOWN:
      values = [one["held_out"][-1][name] for one in found]
      report[arm][name] = {
        "start": [one["held_out"][0][name] for one in found],
        "seeds": values,
        "mean_and_interval": seeds.mean_and_interval(values),
      }
  return report


def main(argv):
  del argv
  config = config_files.build(length_study.LengthConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  results = rl_arms.follow(
    length_study.sweep(config, common.num_seeds(), str(workdir)),
    lambda results: summarize(results) | {"curves": results},
    workdir,
  )
  if results is None:
    return
  draw(workdir, results)
  for arm, found in summarize(results).items():
    for name in _SHOWN:
      print(f"{arm}: {name} {found[name]['mean_and_interval']}")
  print(workdir / "report.json")


if __name__ == "__main__":
  common.run(main)
