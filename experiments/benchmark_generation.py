"""Times generation on this machine's CPU: by position, by batch, beside peers.

python -m experiments.benchmark_generation --workdir=DIR
python -m experiments.benchmark_generation --workdir=DIR --only=position
python -m experiments.benchmark_generation --workdir=DIR --positions=1024,4096

`position`: a decoded token of one sequence of the 100M model `small` against
the tokens in its cache: `engine` (DeepSeek Sparse Attention over pages, with
scheduling and sampling), `dsa` and `dense` (the plain cache, the model alone).
`throughput`: tokens a second of the 65M model against the sequences of a batch
that hold 8192 tokens each, and Hugging Face transformers' step on the same
checkpoint (a forward behind its cache; what its `generate` adds is left out).
`prompts`: 64 prompts of 32 to 64 tokens up to their first tokens, 100M model,
by the rows of a step: in one there is a part of one prompt.
`gap`: how far log-probabilities of engine and trainer are apart, by type.
`speculation`: processor time at batch 1 with drafts of the MTP module and
without: `steps`, of a step of `small` that checks a draft behind the fewest and
the most of --positions; `trained`, of a token of the model `tiny`, trained on a
Markov chain first, with the share of drafts that were right.

Random weights; caches hold random numbers of unit size but in `gap`: what they
hold does not change the work. Each row is a process of its own. Writes JSON
lines to DIR/generation.jsonl, of which the last one of a row counts, and
DIR/position.png and DIR/throughput.png. Needs the `parity` extra, Linux, and
most of an hour.
"""

import json
import os
import pathlib

from absl import flags
import tqdm

from experiments import benchmark_generation_plots
from experiments import benchmark_generation_rows as rows_lib
from experiments import benchmark_table
from experiments import common
from experiments import row_process

common.define_workdir_flag()
_JOBS = ("position", "throughput", "gap", "prompts", "speculation")
_ONLY = flags.DEFINE_multi_enum("only", [], _JOBS, "Jobs to run; none: all.")
_POSITIONS = flags.DEFINE_list(
  "positions",
  [str(1024 << n) for n in range(7)],
  "Tokens in context, for `position`.",
)
_BATCHES = flags.DEFINE_list(
  "batches", ["1", "2", "4", "8", "16"], "Sequences, for `throughput`."
)
_CONTEXT = flags.DEFINE_integer(
  "context", 8192, "Tokens in context, for `throughput`."
)
_THREADS = flags.DEFINE_integer("threads", 2, "CPU threads of both sides.")
_ROW = flags.DEFINE_string("row", None, "One row as JSON, in this process.")


def in_process(row, workdir: pathlib.Path) -> dict:
  """Measures one row in this process, which imports only its side."""
  if row["side"] == "transformers":
    from experiments import transformers_peer

    return transformers_peer.measure_step(row, workdir / "checkpoint")
  from experiments import benchmark_generation_ours

  return benchmark_generation_ours.measure(row, workdir / "checkpoint")


def main(argv):
  del argv
  if flags.FLAGS.workdir is None:
    raise ValueError("--workdir is missing")
  workdir = common.require_workdir()
  if _ROW.value is not None:
    print(json.dumps(in_process(json.loads(_ROW.value), workdir)))
    return
  if _THREADS.value < 1 or _CONTEXT.value < 1:
    raise ValueError(
      f"--threads={_THREADS.value} and --context={_CONTEXT.value} must be"
      " positive"
    )
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
  chosen = [
    row
    for row in rows_lib.rows(
      rows_lib.integers("positions", _POSITIONS.value),
      rows_lib.integers("batches", _BATCHES.value),
      _CONTEXT.value,
      _THREADS.value,
    )
    if not _ONLY.value or row["job"] in _ONLY.value
  ]
  if any(row["job"] in ("throughput", "gap") for row in chosen):
    from experiments import benchmark_parity

    benchmark_parity.make_inputs(workdir, 1)
  results = workdir / "generation.jsonl"
  with open(results, "a", encoding="utf-8") as file:
    for row in tqdm.tqdm(chosen, unit="row"):
      found = row_process.run("experiments.benchmark_generation", row, workdir)
      found |= benchmark_table.machine()
      print(json.dumps(found), file=file, flush=True)
      tqdm.tqdm.write(rows_lib.line(found))
  benchmark_generation_plots.write(results, workdir)


if __name__ == "__main__":
  common.run(main)
