"""Runs a program of experiments/ as its users do, compiling quickly."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(program, config, workdir, *flags, timeout=280):
  """Runs experiments.PROGRAM; returns the finished process and its text.

  Args:
    program: module of experiments/.
    config: --config, from configs/ on.
    workdir: --workdir.
    *flags: what else it is given.
    timeout: seconds.
  """
  return subprocess.run(
    [
      *(sys.executable, "-m", f"experiments.{program}"),
      *(f"--config=configs/{config}", f"--workdir={workdir}", *flags),
    ],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
