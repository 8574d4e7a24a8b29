"""Shows that GRPO works: held-out pass@1 against more supervised fine-tuning.

python -m experiments.rl_shown --config=configs/rl_shown.py --workdir=DIR \
  --seeds=3

Each seed fine-tunes a fresh tiny model on solved problems until its held-out
pass@1 stops rising, and from there goes on with GRPO, whose reward is the
verifier alone, and with the same fine-tuning for the same wall time. Writes
DIR/report.json and DIR/pass_at_1.png. Called again, it goes on where it stood.
"""

import dataclasses
import json

from absl import flags

from dsv32_jax import config_files
from dsv32_jax.evals import plots
from dsv32_jax.evals import seeds
from dsv32_jax.rl import shown
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()
common.define_seeds_flag()


def draw(path, results) -> None:
  """Plots each part's curve of each seed over seconds of training."""
  series, kinds = {}, {}
  for seed, result in enumerate(results):
    offset = result["sft"][-1]["seconds"]
    for part, kind, begin in (
      ("sft", "fine-tuning until it is flat", 0.0),
      ("grpo", "GRPO from its best", offset),
      ("further_sft", "more fine-tuning from its best", offset),
    ):
      points, name = result[part], f"{part}, seed {seed}"
      kinds[name] = kind
      series[name] = (
        [begin + point["seconds"] for point in points],
        [100 * point["pass_at_1"] for point in points],
      )
  plots.lines(
    path,
    series,
    title=f"Held-out pass@1 of the same problems, {len(results)} seeds",
    x_label="wall time of training, seconds",
    y_label="pass@1, percent",
    markers=True,
    from_zero=True,
    kinds=kinds,
  )


def summarize(results) -> dict:
  """Gains in points, the mean over seeds and half of its 95% interval."""
  found = [result["pass_at_1"] for result in results]
  gains = {
    "over_start": [100 * (one["grpo"] - one["start"]) for one in found],
    "over_further_sft": [
      100 * (one["grpo"] - one["further_sft"]) for one in found
    ],
  }
  return {
    "pass_at_1": found,
    "seconds": [
      {part: result[part][-1]["seconds"] for part in ("sft", "grpo")}
      for result in results
    ],
    "gain_in_points": {
      name: {
        "seeds": values,
        "mean_and_interval": seeds.mean_and_interval(values),
      }
      for name, values in gains.items()
    },
  }


def main(argv):
  del argv
  config = config_files.build(shown.ShownConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  results = []
  for seed in range(common.num_seeds()):
    one = dataclasses.replace(
      config, rl=dataclasses.replace(config.rl, seed=config.rl.seed + seed)
    )
    try:
      results.append(shown.compare(one, str(workdir / f"seed_{seed}")))
    except run.Stopped as stopped:
      print(f"seed {seed} {stopped}; the same command goes on from there")
      return
    report = summarize(results)
    text = json.dumps(report | {"curves": results}, indent=1)
    (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
    draw(workdir / "pass_at_1.png", results)
  for name, gain in report["gain_in_points"].items():
    mean, half = gain["mean_and_interval"]
    interval = "" if half is None else f" +- {half:.1f}"
    print(f"GRPO's gain {name}: {mean:.1f}{interval} points")
  print(workdir / "report.json")


if __name__ == "__main__":
  common.run(main)
