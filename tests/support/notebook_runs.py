"""Runs a notebook as its reader would, from the first cell to the last."""

import os
import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"


def execute(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Runs every cell in a folder; raises what a cell raised."""
  client = nbclient.NotebookClient(
    nbformat.read(path, as_version=4),
    timeout=1500,
    kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
  )
  environment = dict(os.environ)
  # Not the tests' eight devices; a notebook says how many it wants.
  environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  environment["PYTHONPATH"] = str(ROOT)
  # With programs that other tests had put there, a kernel has crashed.
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  client.execute(env=environment)
