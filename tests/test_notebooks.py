"""The notebooks run from the first cell to the last, and are fit for Colab."""

import json

import nbformat
import pytest

from tests.support import notebook_runs

NOTEBOOKS = sorted(notebook_runs.FOLDER.glob("*.ipynb"))


def names(path):
  return path.name


def check_grpo(report):
  assert set(report["pass_at_1"]) == {"start", "grpo", "further_sft"}
  assert report["grpo"][-1]["step"] == 2


def check_agents(report):
  assert report["environments"] == report["distinct_data"] == 13
  assert report["tasks"] == 32


def check_accelerator(report):
  ran = [one for one in report["checks"] if "passed" in one]
  assert len({one["operation"] for one in ran}) == 7
  assert all(one["passed"] for one in ran)
  assert not any("failed" in row for row in report["timed"])
  assert report["evaluation"]["devices"] == [1, 2]
  assert min(report["generation"]["tokens_a_second"]) > 0


CHECKS = {
  "accelerator": check_accelerator,
  "agents": check_agents,
  "grpo": check_grpo,
}


def test_each_notebook_has_its_check():
  assert sorted([*CHECKS, "quickstart"]) == [path.stem for path in NOTEBOOKS]


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


# The quickstart's runs in tests/experiments/test_quickstart.py.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
  "path", [path for path in NOTEBOOKS if path.stem in CHECKS], ids=names
)
def test_runs(path, tmp_path):
  notebook_runs.execute(path, tmp_path)
  (report,) = tmp_path.glob("runs/*/smoke/report.json")
  CHECKS[path.stem](json.loads(report.read_text()))
