"""Runs one row of a benchmark in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys


def run(module: str, row: dict, workdir: pathlib.Path) -> dict:
  """Runs `python -m MODULE --workdir=WORKDIR --row=ROW` on CPUs.

  Args:
    module: a program whose --row prints a JSON object as its last line.
    row: what to measure; its `threads` go to OpenMP as well.
    workdir: of the benchmark.

  Returns:
    The row, and what the program printed.

  Raises:
    ValueError: if the program fails.
  """
  command = [sys.executable, "-m", module]
  command += [f"--workdir={workdir}", f"--row={json.dumps(row)}"]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": str(row["threads"]),
    "PYTHONWARNINGS": "ignore",
  }
  root = pathlib.Path(__file__).resolve().parents[1]
  done = subprocess.run(
    command,
    check=False,
    capture_output=True,
    text=True,
    cwd=root,
    env=environment,
  )
  if done.returncode:
    raise ValueError(f"{row=} failed: {done.stderr[-2000:]}")
  return row | json.loads(done.stdout.splitlines()[-1])
