"""The notebooks run from the first cell to the last, and are fit for Colab."""

import json
import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def names(path):
  return path.name


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_form(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert path.read_text(encoding="utf-8").isascii()
  assert notebook.metadata["accelerator"] in ("GPU", "TPU")
  assert "colab" in notebook.cells[0].source
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  for cell in code:
    assert not cell.outputs and cell.execution_count is None
    assert "flags" not in cell.source
  install, devices = code[0].source, code[1].source
  assert "%pip install" in install and "import jax" not in install
  assert "jax.__version__" in devices


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=1500,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  )
  environment = {
    name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
  }
  environment["PYTHONPATH"] = str(ROOT)
  client.execute(env=environment)
  (report,) = tmp_path.glob("runs/*/smoke/report.json")
  assert json.loads(report.read_text())["held_out_loss"]["dsa"] > 0
