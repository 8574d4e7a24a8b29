"""Times this project beside Hugging Face transformers on this machine's CPU.

python -m experiments.benchmark --workdir=DIR
python -m experiments.benchmark --workdir=DIR --only=prefill --lengths=1024
python -m experiments.benchmark --workdir=DIR --readme=README.md

The 65M model of dsv32_jax/model/presets.py with random weights, written once
as a checkpoint that both sides load; float32. The job `parity` comes first:
both run the same tokens, selections must agree and logits match, or the
program stops. Then `prefill`, `train`, `decode`, and `parts` of a layer. Each
row is a process of its own, so that memory is its own too. Results are JSON
lines in DIR/benchmark.jsonl, the last one of a row counts; --readme prints
their table between two markers of that file and measures nothing. Needs the
`parity` extra, Linux, and about half an hour.
"""

import json
import os
import pathlib

from absl import flags
import numpy as np
import tqdm

from experiments import benchmark_table
from experiments import common
from experiments import row_process

common.define_workdir_flag()
_ONLY = flags.DEFINE_list("only", [], "Jobs to run; none: all of them.")
_LENGTHS = flags.DEFINE_list("lengths", [], "Lengths to run; none: all.")
_SIDES = flags.DEFINE_list("sides", [], "ours, transformers; none: both.")
_THREADS = flags.DEFINE_integer("threads", 2, "CPU threads of both sides.")
_README = flags.DEFINE_string("readme", None, "File to write the table to.")
_ROW = flags.DEFINE_string("row", None, "One row as JSON, in this process.")

# New tokens after the prefill of a decode row.
DECODED = 33
PARITY_LENGTH, LONGEST = 1024, 16384
# Resident bytes transformers needs for each pair of tokens: float32 scores of
# 8 heads some times over, kept for the backward pass of 8 layers in training.
BYTES_A_PAIR = {"prefill": 100, "decode": 100, "train": 700}


def rows(threads: int):
  """Yields the rows of the table: job, side, variant and length."""

  def row(job, side, variant, *lengths):
    for length in lengths:
      yield dict(
        job=job, side=side, variant=variant, length=length, threads=threads
      )

  yield from row("parity", "both", "", PARITY_LENGTH)
  prefill, train = (1024, 2048, 4096, 8192, LONGEST), (2048, 4096)
  decode = (4096, 8192)
  for variant in ("default", "dense", "expanded", "gathered"):
    yield from row("prefill", "ours", variant, *prefill)
  for variant in ("default", "dense", "sparse_stage"):
    yield from row("train", "ours", variant, *train)
  for variant in ("default", "dense"):
    yield from row("decode", "ours", variant, *decode)
  yield from row("parts", "ours", "all", 1024, 4096, LONGEST)
  for variant in ("eager/grouped_mm", "sdpa/grouped_mm"):
    for job, lengths in dict(
      prefill=prefill, train=train, decode=decode
    ).items():
      yield from row(job, "transformers", variant, *lengths)


def wanted(row) -> bool:
  """Whether the flags ask for a row."""
  return (
    (not _ONLY.value or row["job"] in _ONLY.value)
    and (not _LENGTHS.value or str(row["length"]) in _LENGTHS.value)
    and (not _SIDES.value or row["side"] in (*_SIDES.value, "both"))
  )


def skipped(row) -> str | None:
  """Why a row cannot run here, or None."""
  if row["side"] != "transformers":
    return None
  needed = BYTES_A_PAIR[row["job"]] * row["length"] ** 2
  for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
    if line.startswith("MemAvailable:"):
      free = 1024 * int(line.split()[1])
      if needed > free:
        return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
      return None
  raise OSError("/proc/meminfo has no MemAvailable")


def in_process(row, workdir: pathlib.Path) -> dict:
  """Measures one row in this process, which imports only its side."""
  if row["job"] == "parity":
    from experiments import benchmark_parity as side

    side.make_inputs(workdir, LONGEST + DECODED)
  elif row["side"] == "ours":
    from experiments import benchmark_ours as side
  else:
    from experiments import transformers_peer as side
  token_ids = np.load(workdir / "tokens.npy")[:, : row["length"] + DECODED]
  return side.measure(row, workdir / "checkpoint", token_ids)


def run(row, workdir: pathlib.Path) -> dict:
  """Measures one row in a process of its own, if it can run here."""
  reason = skipped(row)
  if reason is not None:
    return row | {"skipped": reason}
  return row_process.run("experiments.benchmark", row, workdir)


def main(argv):
  del argv
  if flags.FLAGS.workdir is None:
    raise ValueError("--workdir is missing")
  workdir = common.require_workdir()
  results = workdir / "benchmark.jsonl"
  if _ROW.value is not None:
    print(json.dumps(in_process(json.loads(_ROW.value), workdir)))
    return
  if _README.value is not None:
    benchmark_table.write(results, pathlib.Path(_README.value))
    return
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
  chosen = [row for row in rows(_THREADS.value) if wanted(row)]
  with open(results, "a", encoding="utf-8") as file:
    for row in tqdm.tqdm(chosen, unit="row"):
      found = run(row, workdir) | benchmark_table.machine()
      print(json.dumps(found), file=file, flush=True)
      tqdm.tqdm.write(benchmark_table.line(found))


if __name__ == "__main__":
  common.run(main)
