"""docs/faults.md names every fault, and tests that there are."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "faults.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [
  [cell.strip() for cell in line.split("|")[1:-1]]
  for line in TEXT.splitlines()
  if re.match(r"\| \d+ \|", line)
]
NAMED = sorted(set(TEST.findall(TEXT)))


def test_every_fault_has_a_row():
  assert [row[0] for row in ROWS] == [str(n) for n in range(1, 26)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_says_what_happens_and_names_tests(row):
  _, fault, what, tests = row
  assert fault and what
  assert TEST.findall(tests)
  # Nothing but tests stands there.
  assert not TEST.sub("", tests).replace("<br>", "").strip()


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_the_test_is_there(path, name):
  tree = ast.parse((ROOT / path).read_text())
  functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
  (found,) = (f for f in functions if f.name == name)
  for mark in map(ast.unparse, found.decorator_list):
    assert not mark.startswith(("pytest.mark.skip", "pytest.mark.xfail"))
