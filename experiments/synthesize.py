"""Synthesises agentic tasks of a family, with their verifiers.

python -m experiments.synthesize --config=configs/synthesize.py --workdir=DIR

A run that was killed continues when it is started again. The workdir then has
tasks and trajectories as .jsonl and .parquet (docs/agent_data.md has the
columns), rejections.jsonl and report.json, which also says what bounds the
memory of what ran in the sandbox; of general tasks, databases behind
tools, also environments.jsonl and solution_lengths.png; of search tasks
(:search) the corpus and all candidates; of code tasks (:code)
and questions that only code answers (:interpreter) all candidates. Variants
with "authored" have a model write what else is drawn by procedure.
"""

import json
import sys

from absl import flags
import tqdm

from dsv32_jax import config_files
from dsv32_jax.agents import sandbox
from dsv32_jax.agents.synthesis.code import filters as code_filters
from dsv32_jax.agents.synthesis.code import pipeline as code_pipeline
from dsv32_jax.agents.synthesis.code import setup_agent
from dsv32_jax.agents.synthesis.code import validate
from dsv32_jax.agents.synthesis.general import campaign
from dsv32_jax.agents.synthesis.general import export
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.general import report
from dsv32_jax.agents.synthesis.interpreter import (
  pipeline as interpreter_pipeline,
)
from dsv32_jax.agents.synthesis.search import campaign as search_campaign
from dsv32_jax.agents.synthesis.search import export as search_export
from dsv32_jax.agents.synthesis.search import pipeline as search_pipeline
from experiments import common
from experiments import synthesize_authored

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
  found, line = synthesize(config, workdir, _bar)
  # Imported where the workers, which import this module too, do not come.
  from dsv32_jax.training import metrics

  with metrics.MetricsWriter(workdir) as writer:
    scalars = {k: v for k, v in found.items() if isinstance(v, int)}
    writer.write(0, scalars, "synthesis")
    for name, share in found.get("baselines", {}).items():
      writer.write(0, {"solved": share}, f"baseline_{name}")
  if family not in ("general", "search", "search_authored"):
    # Of what ran in the sandbox for this.
    found["memory_bound"] = sandbox.probe().memory_bound
  path = workdir / "report.json"
  path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
  print(line)
  print(path)


def _general(config, workdir, bar):
  """Makes databases with their tasks; returns numbers and a line of them."""

  campaign.run(config, workdir, bar("environment"))
  export.export(workdir, config.num_trajectories)
  found = report.report(workdir, config.baseline_attempts)
  report.histogram(workdir, workdir / "solution_lengths.png")
  return found, (
    f"{found['environments']} environments, {found['tasks']} tasks,"
    f" {found['pairs_of_schema_and_toolset']} pairs of schema and toolset"
  )


def _search(config, workdir, bar):
  """Makes questions over Python's documentation, and helpful prompts."""
  search_campaign.run(config, workdir, bar("task"))
  search_campaign.run_helpful(config, workdir, bar("prompt"))
  search_export.export(workdir)
  found = search_export.report(workdir)
  return found, (
    f"{found['tasks']} tasks of {found['candidates']} candidates,"
    f" {found['helpful_kept']} of {found['helpful_prompts']} helpful prompts"
  )


def _interpreter(config, workdir, bar):
  """Makes questions that only code answers."""
  interpreter_pipeline.run(config, workdir, bar("task"))
  interpreter_pipeline.export(workdir, config.num_trajectories)
  found = interpreter_pipeline.report(workdir)
  return found, f"{found['tasks']} tasks of {found['candidates']} candidates"


def _code(config, workdir, bar):
  """Makes tasks of a repository's history, or of a file of instances."""
  judge = None
  if config.judge_url:
    judge = code_filters.judged_by(
      lambda: synthesize_authored.policy(config.judge_url, config.judge_model)
    )
  prepare = validate.validate
  if config.setup_url:
    prepare = setup_agent.prepared_by(
      lambda: synthesize_authored.policy(config.setup_url, config.setup_model),
      config.setup_turns,
    )
  code_pipeline.run(config, workdir, bar("candidate"), judge, prepare)
  code_pipeline.export(workdir)
  found = code_pipeline.report(workdir)
  return found, f"{found['tasks']} tasks of {found['candidates']} candidates"


def _bar(unit):
  """Returns a progress bar over a list, or indices of which some are done."""

  def progress(items):
    return tqdm.tqdm(
      items,
      initial=getattr(items, "start", 0),
      total=getattr(items, "stop", len(items)),
      unit=unit,
      disable=not sys.stderr.isatty(),
    )

  return progress


# By config.family: the type of the config, and what makes the tasks.
FAMILIES = {
  **synthesize_authored.FAMILIES,
  "code": (code_pipeline.CodeSynthesisConfig, _code),
  "general": (pipeline.SynthesisConfig, _general),
  "interpreter": (
    interpreter_pipeline.InterpreterSynthesisConfig,
    _interpreter,
  ),
  "search": (search_pipeline.SearchSynthesisConfig, _search),
}

if __name__ == "__main__":
  common.run(main)
