"""The whole of post-training, small: specialists, distillation, mixed RL.

python -m experiments.post_train --config=configs/post_training.py --workdir=DIR

Variants of the config: full, smoke. Writes DIR/report.md, DIR/report.json and
DIR/pass_at_1.png: every model in every domain. Called again, it goes on where
it stood.
"""

import math
import pathlib

from absl import flags

from dsv32_jax import config_files
from dsv32_jax.evals import plots
from dsv32_jax.recipe import post_training
from dsv32_jax.training import run
from experiments import common

common.define_common_flags()


def main(argv):
  del argv
  config = config_files.build(
    post_training.PostTrainingConfig, flags.FLAGS.config
  )
  workdir = common.require_workdir()
  try:
    report = post_training.run(config, str(workdir))
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return
  text = describe(config, report)
  folder = pathlib.Path(workdir)
  (folder / "report.md").write_text(text)
  draw(folder / "pass_at_1.png", report)
  print(text)


def describe(config: post_training.PostTrainingConfig, report: dict) -> str:
  """The report as Markdown."""
  columns = ("all", *config.domains)
  lines = [
    "# Post-training",
    "",
    "Held-out pass@1 in percent, of at most"
    f" {-(-config.rl.evaluation.problems // len(config.domains))} problems a"
    " domain (fewer where it has no more) that no part has trained on; the rows"
    " named as a column are that domain's specialists.",
    "",
    "| model | " + " | ".join(columns) + " | seconds |",
    "|---" * (len(columns) + 2) + "|",
  ]
  for name, found in report["pass_at_1"].items():
    cells = [f"{100 * found[column]:.1f}" for column in columns]
    seconds = report["seconds"][name]
    lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |")
  lines += [
    "",
    "What was distilled, and how many of the specialist's answers its verifier"
    " accepted:",
    "",
    "| specialist | problems | answers | accepted | examples |",
    "|---|---|---|---|---|",
  ]
  for name, counts in report["distilled"].items():
    cells = [counts[k] for k in ("problems", "answers", "accepted", "mixed")]
    lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines) + "\n"


def draw(path, report: dict) -> None:
  """Plots pass@1 of every model in every domain."""
  groups = {}
  for model, found in report["pass_at_1"].items():
    for domain, value in found.items():
      groups.setdefault(domain, {})[model] = (100 * value, math.nan)
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
