"""Synthesises general agentic tasks: databases, tools, tasks and verifiers.

python -m experiments.synthesize --config=configs/synthesize.py --workdir=DIR

A run that was killed continues when it is started again. The workdir then has
environments.jsonl, tasks and trajectories as .jsonl and .parquet (the columns
are in dsv32_jax/agents/synthesis/general/export.py), rejections.jsonl,
report.json and solution_lengths.png.
"""

import json
import sys

from absl import flags
import tqdm

from dsv32_jax import config_files
from dsv32_jax.agents.synthesis.general import campaign
from dsv32_jax.agents.synthesis.general import export
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.general import report
from experiments import common

common.define_common_flags()


def main(argv):
  del argv
  given = flags.FLAGS.config
  family = given.get("family", "general")
  settings = {name: given[name] for name in given if name != "family"}
  if family not in FAMILIES:
    raise ValueError(f"config.{family=} is none of {', '.join(FAMILIES)}")
  config_type, synthesize = FAMILIES[family]
  config = config_files.build(config_type, settings)
  workdir = common.require_workdir()
  found, line = synthesize(config, workdir)
  # Imported where the workers, which import this module too, do not come.
  from dsv32_jax.training import metrics

  with metrics.MetricsWriter(workdir) as writer:
    scalars = {k: v for k, v in found.items() if isinstance(v, int)}
    writer.write(0, scalars, "synthesis")
    for name, share in found["baselines"].items():
      writer.write(0, {"solved": share}, f"baseline_{name}")
  path = workdir / "report.json"
  path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
  print(line)
  print(path)


def _general(config, workdir):
  """Makes databases with their tasks; returns numbers and a line of them."""

  def progress(indices):
    return tqdm.tqdm(
      indices,
      initial=indices.start,
      total=indices.stop,
      unit="environment",
      disable=not sys.stderr.isatty(),
    )

  campaign.run(config, workdir, progress)
  export.export(workdir, config.num_trajectories)
  found = report.report(workdir, config.baseline_attempts)
  report.histogram(workdir, workdir / "solution_lengths.png")
  return found, (
    f"{found['environments']} environments, {found['tasks']} tasks,"
    f" {found['pairs_of_schema_and_toolset']} pairs of schema and toolset"
  )


# By config.family: the type of the config, and what makes the tasks.
FAMILIES = {
  "general": (pipeline.SynthesisConfig, _general),
}

if __name__ == "__main__":
  common.run(main)
