"""Compares ways to manage a long search's context: score, steps, tokens.

python -m experiments.context_study --config=configs/context_study.py \
  --workdir=DIR

Makes search tasks over Python's documentation in DIR/tasks, plays each with no
management, Summary, Discard-75%, Discard-all and parallel sampling, and writes
episodes.jsonl (which experiments.gallery shows), summary.json, summary.md and
study.png. The policy is a script whose only memory is its context; with
--config.base_url and --config.model it is a model behind an OpenAI-compatible
endpoint, whose key the client takes from its own environment variable.
"""

import json
import random
import sys

from absl import flags
import openai
import tqdm

from dsv32_jax import config_files
from dsv32_jax.agents import context_study
from dsv32_jax.agents import endpoint
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import export
from dsv32_jax.agents.synthesis.search import reader
from dsv32_jax.data import tokenizer as tokenizers
from experiments import common

common.define_common_flags()
# A document in one piece, so that a step is a document.
LIMITS = search.SearchLimits(page_chars=16_000)


def main(argv):
  del argv
  config = config_files.build(context_study.ProgramConfig, flags.FLAGS.config)
  workdir = common.require_workdir()
  folder = workdir / "tasks"
  folder.mkdir(exist_ok=True)
  campaign.run(config.tasks, folder)
  campaign.run_helpful(config.tasks, folder)
  export.export(folder)
  tasks = [
    row
    for row in tables.read_jsonl(folder / "tasks.jsonl")
    if row["kind"] == "question"
  ]
  index = campaign.open_corpus(config.tasks, folder)
  count = config.study.num_tasks * len(context_study.names(config.study))
  with tqdm.tqdm(total=count, disable=not sys.stderr.isatty()) as bar:
    rows = context_study.run(
      config.study,
      tasks,
      make_policy(config, index),
      lambda task: search.SearchEnvironment(index, task, limits=LIMITS),
      workdir / "episodes.jsonl",
      on_row=lambda row: bar.update(),
    )
  index.close()
  summary = context_study.summarize(rows)
  text = context_study.table(summary)
  (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  (workdir / "summary.md").write_text(text)
  context_study.plot(rows, workdir / "study.png")
  print(text, end="")
  print(workdir / "study.png")


def make_policy(config, index):
  """Returns a function of an attempt's name to what plays it."""
  if config.base_url:
    client = openai.AsyncOpenAI(base_url=config.base_url)
    return lambda name: endpoint.EndpointPolicy(client, config.model)
  tokenizer = tokenizers.train(
    (document.text for document in index.documents()), config.vocab_size
  )
  return lambda name: policies.ScriptedPolicy(
    reader.script(random.Random(name)), tokenizer
  )


if __name__ == "__main__":
  common.run(main)
