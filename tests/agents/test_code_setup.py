"""A policy finds out how a tree is built and tested; what it says is tried."""

import json

import pytest

from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.synthesis.code import filters
from dsv32_jax.agents.synthesis.code import pipeline
from dsv32_jax.agents.synthesis.code import setup_agent
from tests.support import code_repository as repositories
from tests.support.authors import say

# The module of the blanks is made by a build, and tests want a variable.
BROKEN = {
  "counting/__init__.py": "",
  "counting/words.py": (
    "from counting import blanks\n\n\n"
    "def count(text):\n  return len(text.split(blanks.ONE))\n"
  ),
  "build.sh": "echo \"ONE = ' '\" > counting/blanks.py\n",
  "tests/test_words.py": "def test_it():\n  pass\n",
}
FIXED = {
  "counting/words.py": (
    "from counting import blanks\n\n\n"
    "def count(text):\n  return len(text.replace('  ', blanks.ONE).split())\n"
  ),
  "tests/test_words.py": (
    "import os\n\nfrom counting import words\n\n\n"
    "def test_two():\n  assert words.count('a b') == 2\n\n\n"
    "def test_blanks():\n  assert os.environ['MODE'] == 'full'\n"
    "  assert words.count('a  b ') == 2\n"
  ),
}
BUILD, RUNNER = ["sh build.sh"], ["env", "MODE=full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("history") / "counts"
  folder.mkdir()
  repositories.commit(folder, BROKEN, "Begin")
  repositories.commit(folder, FIXED, "Blanks are no words, however many")
  return folder


def made(folder, workdir, *replies, turns=10):
  config = pipeline.CodeSynthesisConfig(
    repository=str(folder),
    environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    memory_gib=2,
    processes=32,
    seconds=30.0,
    filters=filters.FilterConfig(least_words=3),
    workers=1,
  )
  policy = policies.ScriptedPolicy(policies.replies(*replies))
  prepare = setup_agent.prepared_by(lambda: policy, turns)
  pipeline.run(config, workdir, prepare=prepare)
  pipeline.export(workdir)
  (row,) = tables.read_jsonl(workdir / "candidates.jsonl")
  return row


def hand_in(setup=(), test_command=()):
  return say(
    "hand_in_setup", setup=list(setup), test_command=list(test_command)
  )


def test_a_setup_is_found_by_trying(folder, tmp_path):
  runner = (*RUNNER, *languages.PYTHON.command)
  row = made(
    folder,
    tmp_path,
    say("shell", command="cat build.sh; git log"),
    hand_in(),  # Nothing can be imported, before or after.
    hand_in(["sh no-such-file.sh"]),
    hand_in(BUILD, ["pytest"]),
    hand_in(BUILD, RUNNER),
    hand_in(BUILD, runner),
  )
  assert row["status"] == "kept"
  assert row["counts"]["fail_to_pass"] == 1
  assert row["counts"]["pass_to_fail"] == 0
  (task,) = pipeline.read_tasks(tmp_path / "tasks.jsonl")
  assert task.setup == tuple(BUILD) and task.runner == runner
  # An agent's fix is graded by the task's own runner.
  box = repositories.sandbox("bubblewrap")
  bare = repositories.workspace(folder, task.commit, box)
  calls = [
    repositories.call("shell", command=BUILD[0]),
    repositories.call("run_tests", files=["tests/test_words.py"]),
    repositories.write("counting/words.py", FIXED["counting/words.py"]),
  ]
  told, grade = repositories.play(bare, task, calls)
  assert grade.reward == 1 and "1 passed" in told[1]
  assert repositories.play(bare, task, calls[:2])[1].reward == 0


@pytest.mark.parametrize(
  ("replies", "told"),
  [
    ([hand_in()] * 3, "ended with max_turns; last: tests: no fail-to-pass"),
    ([hand_in(["exit 3"])] * 3, "last: build: the build fails"),
    (
      [hand_in(BUILD, ["true", "{files}", "{report}"])] * 3,
      "last: tests: no fail-to-pass",
    ),
    ([hand_in(BUILD, ["true"])] * 3, "last: runner='true' must have {files}"),
    ([say("hand_in_setup", setup="x")] * 3, "ended with max_turns"),
    ([{"role": "assistant", "content": "make"}], "ended with answered"),
  ],
)
def test_a_setup_that_does_not_come_out(folder, tmp_path, replies, told):
  row = made(folder, tmp_path, *replies, turns=3)
  assert (row["status"], row["stage"]) == ("rejected", "setup")
  assert told in row["reason"], row["reason"]
  (line,) = (tmp_path / "rejections.jsonl").read_text().splitlines()
  assert json.loads(line)["reason"] == row["reason"]


def test_a_setup_that_does_the_fix_leaves_nothing_to_fix(folder, tmp_path):
  """A tree built to pass already has no fail-to-pass."""
  text = FIXED["counting/words.py"].replace("\n", "\\n")
  cheat = f'printf "{text}" > counting/words.py'
  runner = [*RUNNER, *languages.PYTHON.command]
  row = made(folder, tmp_path, *[hand_in([*BUILD, cheat], runner)] * 3, turns=3)
  assert row["status"] == "rejected"
  assert "does not apply" in row["reason"] or "no fail-to" in row["reason"]


def test_a_runner_has_its_places():
  for wrong in (("pytest",), ("x", "{files}"), ("{files}x", "{report}")):
    with pytest.raises(ValueError, match="runner="):
      grading.check_runner(wrong)
  assert grading.check_runner(()) is None
