"""Measures what a tiny model learns from episodes in environments.

python -m experiments.learned --config=configs/learned.py:lookups --workdir=DIR

A fresh model is fine-tuned on the solutions of some tasks, then learns by GRPO
from episodes of its own. Both are asked held-out tasks of the families trained
on, and tasks of families never trained on, one try each. Writes
DIR/report.json: solved, asked, share and its 95% interval (Wilson's), and the
change from one to the other with its own. Called again, it goes on where it
stood; DIR/sft/checkpoints and DIR/tokenizer.json are a start for
experiments.train_rl.
"""

import json

from absl import flags
import numpy as np
from scipy import stats

from dsv32_jax import config_files
from dsv32_jax.evals import held_out
from dsv32_jax.rl import learned
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()
_STAGES = ("sft", "grpo")


def share(outcomes) -> dict:
  """Solved of asked tasks, and the share's 95% interval."""
  solved, asked = round(sum(outcomes)), len(outcomes)
  interval = stats.binomtest(solved, asked).proportion_ci(method="wilson")
  return {
    "solved": solved,
    "asked": asked,
    "share": solved / asked,
    "interval": [float(interval.low), float(interval.high)],
  }


def summarize(found) -> dict:
  """Shares by group and stage, whole and by domain, and paired changes."""
  report = {}
  for group, domains in found["domains"].items():
    before, after = (np.array(found[stage][group]) for stage in _STAGES)
    mean, half = held_out.mean_and_interval(after - before)
    report[group] = {
      **{stage: share(found[stage][group]) for stage in _STAGES},
      "change": {"mean": mean, "interval": [mean - half, mean + half]},
      "domains": {
        domain: {
          stage: share(values[np.array(domains) == domain])
          for stage, values in zip(_STAGES, (before, after))
        }
        for domain in sorted(set(domains))
      },
    }
  return report


def main(argv):
  del argv
  config = config_files.build(learned.LearnedConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  try:
    found = learned.run(config, str(workdir))
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return
  report = summarize(found) | {"curve": learned.curve(str(workdir))}
  text = json.dumps(report, indent=1)
  (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
  for group in found["domains"]:
    for stage in _STAGES:
      one = report[group][stage]
      low, high = one["interval"]
      print(
        f"{group} families after {stage}: {one['solved']} of {one['asked']}"
        f" ({100 * one['share']:.1f}%, {100 * low:.1f} to {100 * high:.1f})"
      )
    change = report[group]["change"]
    low, high = change["interval"]
    print(
      f"{group} families, change: {100 * change['mean']:+.1f} points"
      f" ({100 * low:+.1f} to {100 * high:+.1f})"
    )
  print(workdir / "report.json")


if __name__ == "__main__":
  common.run(main)
