"""Times a training step on this machine's CPU as sequences grow.

python -m experiments.benchmark_training --workdir=DIR
python -m experiments.benchmark_training --workdir=DIR --lengths=1024,2048
python -m experiments.benchmark_training --workdir=DIR --parts_of=2048

`step`: one whole optimiser step of the 100M model `small` (--model) on one
document of so many tokens: `dsa` is the sparse stage, its indexer's loss
included, `dense` the same losses but for that one and attention over every key.
With it go the compiler's memory, the share of time of each part from a profile,
and the profile itself for xprof in DIR/profiles. `input`: tokens a second of
the input pipeline, encoding included, beside which the step has to be slower.

Random weights and tokens, float32. Each row is a process of its own: a step to
warm up, up to three that are timed, one that is profiled; of long sequences
(--single_from) a single step is timed. Writes JSON lines to DIR/training.jsonl,
of which the last one of a row counts, and plots: DIR/speed.png, DIR/time.png,
DIR/memory.png and, of what was profiled, DIR/parts.png. Needs Linux.
"""

import json
import os

from absl import flags
import tqdm

from experiments import benchmark_table
from experiments import benchmark_training_plots as plots
from experiments import benchmark_training_rows as rows_lib
from experiments import common
from experiments import row_process

common.define_workdir_flag()
_LENGTHS = flags.DEFINE_list(
  "lengths", [str(1024 << n) for n in range(6)], "Tokens of a sequence."
)
_MODEL = flags.DEFINE_enum("model", "small", list(rows_lib.MODELS), "Preset.")
_REMAT = flags.DEFINE_enum(
  "remat", "layer", list(rows_lib.REMAT), "What a layer keeps."
)
_THREADS = flags.DEFINE_integer(
  "threads", 2, "CPU threads.", lower_bound=1, upper_bound=1024
)
_SINGLE_FROM = flags.DEFINE_integer(
  "single_from",
  4096,
  "From this length on a row is a single step, not profiled.",
  lower_bound=1,
)
_PARTS_OF = flags.DEFINE_integer(
  "parts_of", None, "Measure nothing; print the parts at this length."
)
_ROW = flags.DEFINE_string("row", None, "One row as JSON, in this process.")


def main(argv):
  del argv
  if flags.FLAGS.workdir is None:
    raise ValueError("--workdir is missing")
  workdir = common.require_workdir()
  results = workdir / "training.jsonl"
  if _ROW.value is not None:
    print(json.dumps(rows_lib.measure(json.loads(_ROW.value), workdir)))
    return
  if _PARTS_OF.value is not None:
    print(plots.parts_table(plots.load(results), _PARTS_OF.value))
    return
  lengths = rows_lib.check_lengths(_LENGTHS.value, _MODEL.value)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
  chosen = rows_lib.rows(
    lengths,
    _MODEL.value,
    _REMAT.value,
    _THREADS.value,
    _SINGLE_FROM.value,
  )
  with open(results, "a", encoding="utf-8") as file:
    for row in tqdm.tqdm(list(chosen), unit="row"):
      found = row_process.run("experiments.benchmark_training", row, workdir)
      found |= benchmark_table.machine()
      print(json.dumps(found), file=file, flush=True)
      tqdm.tqdm.write(rows_lib.line(found))
  plots.write(results, workdir)


if __name__ == "__main__":
  common.run(main)
