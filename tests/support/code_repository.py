"""Small git repositories with a fault, its fix and the tests that tell."""

import asyncio
import dataclasses
import os
import pathlib
import shutil
import subprocess

import pytest

from dsv32_jax.agents import sandbox as sandboxes
from dsv32_jax.agents.environments import code
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.repository import tree
from dsv32_jax.agents.repository import workspace as workspaces
from tests.support import attacks

LIMITS = sandboxes.Limits(
  cpu_seconds=30,
  memory_bytes=4 << 30,
  processes=64,
  output_bytes=32 << 20,
  disk_bytes=32 << 20,
  files=2000,
)
SECRET = "hidden-7c1b"
PYTHON_BROKEN = {
  "counting/__init__.py": "",
  "counting/words.py": "def count(text):\n  return len(text.split(' '))\n",
  "tests/test_words.py": (
    "from counting import words\n\n\n"
    "def test_two():\n  assert words.count('a b') == 2\n"
  ),
  "pytest.ini": "[pytest]\naddopts = -p no:randomly\n",
  "README.md": "Counts words.\n",
}
PYTHON_FIXED = "def count(text):\n  return len(text.split())\n"
PYTHON_TESTS = f"""from counting import words


def test_two():
  assert words.count('a b') == 2


def test_spaces():
  # {SECRET}
  assert words.count('a  b ') == 2


class TestEmpty:

  def test_nothing(self):
    assert words.count('') == 0
"""
JAVASCRIPT_BROKEN = {
  "words.js": "exports.count = (text) => text.split(' ').length;\n",
  "test/words.test.js": (
    'const test = require("node:test");\n'
    'const assert = require("node:assert");\n'
    'const { count } = require("../words.js");\n'
    'test("two", () => assert.strictEqual(count("a b"), 2));\n'
  ),
}
JAVASCRIPT_FIXED = (
  "exports.count = (text) =>\n"
  "  text.split(' ').filter((word) => word).length;\n"
)
JAVASCRIPT_TESTS = JAVASCRIPT_BROKEN["test/words.test.js"] + (
  'test.describe("blanks", () => {\n'
  f"  // {SECRET}\n"
  '  test.it("many", () => assert.strictEqual(count("a  b "), 2));\n'
  '  test.it("none", () => assert.strictEqual(count(""), 0));\n'
  "});\n"
)
SOURCES = {
  "python": (PYTHON_BROKEN, "tests/test_words.py", PYTHON_TESTS),
  "javascript": (JAVASCRIPT_BROKEN, "test/words.test.js", JAVASCRIPT_TESTS),
}
MUST_PASS = {
  "python": (
    "tests.test_words::test_two",
    "tests.test_words::test_spaces",
    "tests.test_words.TestEmpty::test_nothing",
  ),
  "javascript": (
    "test/words.test.js::test::two",
    "test/words.test.js::blanks::test::many",
    "test/words.test.js::blanks::test::none",
  ),
}
FIX = {
  "python": ("counting/words.py", PYTHON_FIXED),
  "javascript": ("words.js", JAVASCRIPT_FIXED),
}


def has_node() -> bool:
  """Tells whether there is a Node whose runner writes JUnit reports."""
  node = shutil.which("node")
  if node is None:
    return False
  told = subprocess.run([node, "--version"], check=True, capture_output=True)
  return int(told.stdout.decode().strip().lstrip("v").split(".")[0]) >= 20


needs_node = pytest.mark.skipif(not has_node(), reason="there is no Node 20")


def git(folder: pathlib.Path, *arguments: str) -> str:
  """Runs git as a user of that repository would."""
  identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
  done = subprocess.run(
    ["git", *identity, *arguments],
    cwd=folder,
    check=True,
    capture_output=True,
    text=True,
    env={"PATH": os.defpath, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"},
  )
  return done.stdout.strip()


def commit(folder: pathlib.Path, files: dict, message: str) -> str:
  """Writes files, None for one to remove, and commits; returns its name."""
  if not (folder / ".git").exists():
    git(folder, "init", "-q", "-b", "main")
  for path, text in files.items():
    if text is None:
      (folder / path).unlink()
      continue
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)
  git(folder, "add", "-A")
  git(folder, "commit", "-q", "-m", message)
  return git(folder, "rev-parse", "HEAD")


def sandbox(backend: str):
  """Returns a sandbox in which pytest starts without plugins, so quickly."""
  return workspaces.sandbox(
    attacks.find(backend), environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
  )


def workspace(folder: pathlib.Path, name: str, box) -> workspaces.Workspace:
  """Returns the built tree of a commit."""
  bare = workspaces.Workspace(
    box=box, image=tree.read(folder, name), limits=LIMITS, seconds=20.0
  )
  return code.build_tree((), bare)


def make(language: str, folder: pathlib.Path, box):
  """Returns the built tree of a repository with a fault, and the task."""
  files, path, tests = SOURCES[language]
  tree_of = workspace(folder, commit(folder, files, "Begin"), box)
  names = [name.split("::")[-1] for name in MUST_PASS[language]]
  known = languages.find(language)
  task = grading.CodeTask(
    id=f"{language}-1",
    language=language,
    repository=str(folder),
    commit=git(folder, "rev-parse", "HEAD"),
    statement="Blanks are no words.",
    hidden=known.with_decoys({path: tests}, names, "0"),
    must_pass=MUST_PASS[language],
  )
  script = write(*FIX[language]).arguments["command"]
  delta = tree_of.run({"operation": "shell", "commands": [script]}).delta
  answer = tree_of.run(grading.order(known, task.hidden), delta)
  found = grading.outcomes(known, task.hidden, answer)
  assert {n for n in found if found[n] == "passed"} == set(task.must_pass)
  decoys = tuple(sorted(n for n in found if found[n] == "failed"))
  return tree_of, dataclasses.replace(task, must_fail=decoys)


def play(tree_of, task, calls):
  """Returns the observations and the grade of an episode."""

  async def episode():
    environment = code.CodeEnvironment(task, tree_of)
    await environment.reset()
    steps = [await environment.step(call) for call in calls]
    reward = await environment.verify()
    await environment.close()
    assert reward == environment.last_grade.reward
    return [step.observation for step in steps], environment.last_grade

  return asyncio.run(episode())


def call(name: str, **arguments) -> protocol.ToolCall:
  return protocol.ToolCall(name=name, arguments=arguments)


def write(path: str, text: str) -> protocol.ToolCall:
  """Returns the call that overwrites a file by the shell."""
  folder = os.path.dirname(path) or "."
  script = f"mkdir -p {folder} && rm -rf {path} && cat > {path} <<'END_OF_IT'\n"
  return call("shell", command=f"{script}{text}\nEND_OF_IT")
