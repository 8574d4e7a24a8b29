"""How tests of a language are told from sources, and run to a JUnit report."""

from collections.abc import Iterable, Mapping
import dataclasses
import os
import random

from dsv32_jax.agents.repository import decoys
from dsv32_jax.agents.repository import folders
from dsv32_jax.agents.repository import javascript_decoys

# pytest is imported before anything of the repository can be; `python -m
# pytest` would look for it there first.
_PYTEST = (
  "import os, sys, pytest; sys.path.insert(0, os.getcwd());"
  " sys.exit(pytest.main(sys.argv[1:]))"
)
_QUIETLY = ("python", "-I", "-c", _PYTEST, "-q", "-p", "no:cacheprovider")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
  """One language with its test runner.

  A pattern without "/" is matched with each part of a path, one with "/" with
  the whole.

  Attributes:
    name: of the language.
    sources: patterns of files that a fix may consist of.
    tests: patterns of files that tests consist of.
    settings: patterns of what else decides what a test run means, or is made
      by one: settings of the runner, caches, installed packages. In a graded
      run neither these nor tests are the agent's.
    command: of a graded test run; "{files}" becomes the files, "{report}" the
      path of the report.
    shown: of a test run whose output an agent reads.
    one_by_one: whether each file needs a run, as its report does not name it.
    add_decoys: adds tests that have to fail to the text of a test file.
  """

  name: str
  sources: tuple[str, ...]
  tests: tuple[str, ...]
  settings: tuple[str, ...]
  command: tuple[str, ...]
  shown: tuple[str, ...]
  one_by_one: bool
  add_decoys: decoys.AddDecoys

  @property
  def protected(self) -> tuple[str, ...]:
    return (*self.tests, *self.settings, ".git")

  def is_test(self, path: str) -> bool:
    """Tells whether a changed file belongs to the tests."""
    return folders.is_protected(path, (*self.tests, *self.settings))

  def is_source(self, path: str) -> bool:
    """Tells whether a changed file may be part of a fix."""
    return not self.is_test(path) and folders.is_protected(path, self.sources)

  def is_run(self, path: str) -> bool:
    """Tells whether a test file is given to the runner."""
    name = os.path.basename(path)
    return folders.is_protected(name, self.sources) and any(
      folders.is_protected(name, [pattern])
      for pattern in self.tests
      if "*" in pattern
    )

  def batches(self, files: Iterable[str]) -> list[list[str]]:
    """Returns the files of each run."""
    chosen = sorted(path for path in files if self.is_run(path))
    if self.one_by_one:
      return [[path] for path in chosen]
    return [chosen] if chosen else []

  def with_decoys(
    self, files: Mapping[str, str | None], names: Iterable[str], seed: str
  ) -> dict[str, str | None]:
    """Returns test files to which tests that have to fail are added.

    Args:
      files: path to text.
      names: of the tests that decoys should resemble, as a report has them.
      seed: of the choice.
    """
    names = set(names)
    return {
      path: self.add_decoys(text, names, random.Random(f"{seed}/{path}"))
      if text is not None and self.is_run(path)
      else text
      for path, text in files.items()
    }


PYTHON = Language(
  name="python",
  sources=("*.py",),
  tests=("test_*.py", "*_test.py", "tests", "test", "conftest.py"),
  settings=(
    "pytest.ini",
    ".pytest.ini",
    "pytest.toml",
    "tox.ini",
    "setup.cfg",
    "pyproject.toml",
    "sitecustomize.py",
    "usercustomize.py",
    "*.pth",
    "*.pyc",
    "__pycache__",
    ".pytest_cache",
  ),
  command=(*_QUIETLY, "--junitxml={report}", "{files}"),
  shown=(*_QUIETLY, "{files}"),
  one_by_one=False,
  add_decoys=decoys.python,
)

# Loaded before any test: checks that code under test cannot replace.
_GUARD = (
  "--import=data:text/javascript,import assert from 'node:assert';"
  "import test from 'node:test';"
  "for (const one of [assert, assert.strict, test]) Object.freeze(one);"
)

JAVASCRIPT = Language(
  name="javascript",
  sources=("*.js", "*.mjs", "*.cjs"),
  tests=(
    "*.test.js",
    "*.test.mjs",
    "*.test.cjs",
    "*.spec.js",
    "tests",
    "test",
    "__tests__",
  ),
  settings=("package.json", "package-lock.json", ".npmrc", "node_modules"),
  command=(
    "node",
    _GUARD,
    "--test",
    "--test-reporter=junit",
    "--test-reporter-destination={report}",
    "{files}",
  ),
  shown=("node", "--test", "--test-reporter=spec", "{files}"),
  one_by_one=True,
  add_decoys=javascript_decoys.add,
)

LANGUAGES = {language.name: language for language in (PYTHON, JAVASCRIPT)}


def find(name: str) -> Language:
  """Returns a language by name; ValueError if there is none."""
  if name not in LANGUAGES:
    raise ValueError(f"language={name!r} is none of {', '.join(LANGUAGES)}")
  return LANGUAGES[name]
