"""Code tasks from a history and from instances, on a repository made here."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from dsv32_jax import config_files
from dsv32_jax.agents import policy
from dsv32_jax.agents import tables
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import tree
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.synthesis.code import candidates
from dsv32_jax.agents.synthesis.code import filters
from dsv32_jax.agents.synthesis.code import pipeline
from dsv32_jax.agents.synthesis.code import validate
from tests.support import code_repository as repositories

FIXED = {
  "counting/words.py": repositories.PYTHON_FIXED,
  "tests/test_words.py": repositories.PYTHON_TESTS,
}
LAST = {
  "counting/lines.py": "def count(text):\n  return text.count('\\n')\n",
  "tests/test_lines.py": (
    "from counting import lines\n\n\n"
    "def test_lines():\n  assert lines.count('a\\n') == 1\n"
  ),
}
FLAKY = LAST["tests/test_lines.py"] + (
  "\n\ndef test_luck():\n  assert open(__file__).read().count('def ') < 4\n"
)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
  """A repository whose commits each end in one way; names by what they are."""
  folder = tmp_path_factory.mktemp("history") / "counts"
  folder.mkdir()
  add = lambda files, message: repositories.commit(folder, files, message)
  names = {"first": add(repositories.PYTHON_BROKEN, "Begin")}
  names["fix"] = add(FIXED, "Blanks are no words.\n\nFixes #7\n")
  names["routine"] = add(
    {"counting/words.py": repositories.PYTHON_FIXED + "\n", **_touched(1)},
    "Bump the version of all that there is",
  )
  names["short"] = add(
    {"counting/words.py": repositories.PYTHON_FIXED, **_touched(2)}, "Oops"
  )
  names["no tests"] = add(
    {"counting/more.py": "x = 1\n"}, "More of what can be counted"
  )
  names["no sources"] = add(_touched(3), "Tests say more than they did before")
  names["nothing fixed"] = add(
    {"counting/more.py": "x = 2\n", **_touched(4)},
    "Two of what can be counted now",
  )
  names["broken"] = add(
    {
      "counting/words.py": "def count(text):\n  return 2\n\n\nlate = 1\n",
      "tests/test_words.py": repositories.PYTHON_TESTS
      + "\n\ndef test_late():\n  assert words.late == 1\n",
    },
    "Counting is not what it was before",
  )
  names["binary"] = add(
    {"counting/more.py": "x = 3\n", "tests/data.bin": "\0\1", **_touched(5)},
    "A file that is no text at all",
  )
  return folder, names


def _touched(number):
  return {"tests/test_words.py": repositories.PYTHON_TESTS + f"# {number}\n"}


def config(folder, **changed):
  values = {
    "repository": str(folder),
    "environment": {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    "memory_gib": 2,
    "processes": 32,
    "seconds": 30.0,
    "filters": filters.FilterConfig(least_words=3),
    "workers": 1,
  }
  return pipeline.CodeSynthesisConfig(**{**values, **changed})


@pytest.fixture(scope="module")
def made(history, tmp_path_factory):
  """The folder of a synthesis over the whole history."""
  workdir = tmp_path_factory.mktemp("synthesis")
  pipeline.run(config(history[0]), workdir)
  pipeline.export(workdir)
  return workdir


def by_name(folder, names):
  rows = list(tables.read_jsonl(folder / "candidates.jsonl"))
  found = {row["id"]: row for row in rows}
  return {
    name: found.get(f"counts-{commit[:12]}") for name, commit in names.items()
  }


def test_each_commit_ends_as_it_should(history, made):
  rows = by_name(made, history[1])
  assert rows.pop("first") is None
  fix = rows.pop("fix")
  assert fix["status"] == "kept"
  assert fix["counts"] == {
    "fail_to_pass": 2,
    "pass_to_pass": 1,
    "pass_to_fail": 0,
    "decoys": 3,
  }
  assert {
    name: (row["stage"], row["reason"]) for name, row in rows.items()
  } == {
    "routine": ("filter", "the statement is of a routine change"),
    "short": ("filter", "the statement is too short"),
    "no tests": ("filter", "no test file of a known language is touched"),
    "no sources": ("filter", "no source file is touched"),
    "nothing fixed": ("tests", "no fail-to-pass"),
    "broken": (
      "tests",
      "1 pass-to-fail: tests.test_words.TestEmpty::test_nothing is failed"
      " after the patch",
    ),
    "binary": ("filter", "a patch holds binary files"),
  }


def test_what_is_written_for_others(made):
  report = pipeline.report(made)
  assert (report["candidates"], report["tasks"]) == (8, 1)
  assert report["languages"] == {"python": 1}
  assert report["rejections"]["tests"] == {
    "no fail-to-pass": 1,
    "1 pass-to-fail": 1,
  }
  lines = (made / "rejections.jsonl").read_text().splitlines()
  assert sorted(json.loads(lines[0])) == ["id", "reason", "stage"]
  assert len(lines) == 7
  import pyarrow.parquet as parquet

  table = parquet.read_table(made / "tasks.parquet").to_pylist()
  assert table == list(tables.read_jsonl(made / "tasks.jsonl"))
  assert list(table[0]) == pipeline.TASK_SCHEMA.names


def test_a_task_is_played_from_its_file(history, made):
  """The solution that history has is rewarded, half of it is not."""
  (task,) = pipeline.read_tasks(made / "tasks.jsonl")
  assert task.statement == "Blanks are no words.\n\nFixes #7"
  assert task.commit == history[1]["first"]
  box = repositories.sandbox("bubblewrap")
  workspace = repositories.workspace(history[0], task.commit, box)
  patched = workspace.run({"operation": "apply", "patch": task.patch})
  assert patched.delta.texts()["counting/words.py"] == repositories.PYTHON_FIXED
  assert grading.grade(task, workspace, patched.delta).reward == 1
  half = repositories.PYTHON_FIXED.replace("split()", "split('  ')")
  calls = [repositories.write("counting/words.py", half)]
  assert repositories.play(workspace, task, calls)[1].reward == 0


def test_running_again_decides_nothing_anew(history, made):
  before = (made / "candidates.jsonl").read_bytes()
  seen = []
  pipeline.run(config(history[0]), made, lambda items: seen.extend(items) or [])
  assert seen == [] and (made / "candidates.jsonl").read_bytes() == before
  with pytest.raises(ValueError, match="was made with seconds="):
    pipeline.run(config(history[0], seconds=31.0), made)


PROGRAM = """
import json, os, pathlib, signal, sys
from dsv32_jax import config_files
from dsv32_jax.agents.synthesis.code import pipeline
settings = json.loads(sys.argv[1])
config = config_files.build(pipeline.CodeSynthesisConfig, settings)
def until_three(items):
  for number, item in enumerate(items):
    if number == 3:
      os.kill(os.getpid(), signal.SIGKILL)
    yield item
pipeline.run(config, pathlib.Path(sys.argv[2]), until_three)
"""


@pytest.mark.slow
def test_a_killed_run_is_continued(history, made, tmp_path):
  folder = history[0]
  settings = json.dumps(config_files.dump(config(folder)))
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, settings, str(tmp_path)],
    check=False,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    capture_output=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  path = tmp_path / "candidates.jsonl"
  assert 2 <= path.read_text().count("\n") <= 3
  # As if the kill had come while a row was written.
  path.write_bytes(path.read_bytes()[:-9])
  pipeline.run(config(folder), tmp_path)
  pipeline.export(tmp_path)
  for name in ("tasks.jsonl", "rejections.jsonl"):
    assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.slow
def test_instances_of_a_file_give_the_same_task(history, made, tmp_path):
  folder, names = history
  (mined,) = [
    c
    for c in candidates.from_history(str(folder), "HEAD", 100)
    if names["fix"].startswith(c.id.split("-")[1])
  ]
  row = {
    "instance_id": mined.id,
    "repo": "someone/counts",
    "base_commit": names["first"],
    "problem_statement": mined.statement,
    "patch": mined.patch,
    "test_patch": mined.test_patch,
    "FAIL_TO_PASS": "[]",
  }
  wrong = {
    **row,
    "instance_id": "b",
    "patch": row["patch"].replace("' '", "'x'"),
  }
  unread = {**row, "instance_id": "c", "patch": "@@ what"}
  elsewhere = {**row, "instance_id": "d", "base_commit": "0" * 40}
  tests = {**row, "instance_id": "e", "test_patch": row["patch"]}
  path = tmp_path / "instances.jsonl"
  rows = [row, wrong, unread, elsewhere, tests]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  (tmp_path / "clones").mkdir()
  (tmp_path / "clones" / "someone__counts").symlink_to(folder)
  clones = config(tmp_path / "clones", instances=str(path))
  pipeline.run(clones, tmp_path)
  pipeline.export(tmp_path)
  (task,) = pipeline.read_tasks(tmp_path / "tasks.jsonl")
  (known,) = pipeline.read_tasks(made / "tasks.jsonl")
  assert task.hidden == known.hidden and task.must_pass == known.must_pass
  assert task.must_fail == known.must_fail
  found = list(tables.read_jsonl(tmp_path / "rejections.jsonl"))
  assert [(r["id"], r["stage"]) for r in found] == [
    ("b", "patch"),
    ("c", "filter"),
    ("d", "build"),
    ("e", "filter"),
  ]
  assert "does not apply" in found[0]["reason"]
  path.write_text(json.dumps({**row, "repo": 3}) + "\n")
  with pytest.raises(ValueError, match=r"jsonl:1: repo must be text"):
    list(candidates.from_instances(path, "."))


@pytest.mark.slow
def test_luck_and_a_build_that_fails_are_told(tmp_path):
  base = repositories.commit(tmp_path, repositories.PYTHON_BROKEN, "Begin")
  repositories.commit(
    tmp_path, {**LAST, "tests/test_lines.py": FLAKY}, "Lines are counted too"
  )
  (candidate,) = candidates.from_history(str(tmp_path), "HEAD", 10)
  assert candidate.commit == base
  box = repositories.sandbox("bubblewrap")
  # Passes twice, then decoys are added.
  with pytest.raises(validate.Rejection, match="test_luck passed once") as told:
    validate.validate(candidate, box, limits=repositories.LIMITS)
  assert told.value.stage == "flaky"
  with pytest.raises(validate.Rejection, match="the build fails: no make"):
    validate.validate(candidate, box, setup=("echo no make; false",))


def test_issues_stand_for_the_messages_that_close_them(history, tmp_path):
  path = tmp_path / "issues.jsonl"
  path.write_text(
    '{"number": 7, "title": "Blanks", "body": "count too much"}\n'
  )
  issues = candidates.read_issues(path)
  found = candidates.from_history(str(history[0]), "HEAD", 100, issues)
  told = {c.statement for c in found}
  assert "Blanks\n\ncount too much" in told and "Oops" in told
  path.write_text('{"number": "7", "title": "x"}\n')
  with pytest.raises(ValueError, match="needs number and title"):
    candidates.read_issues(path)
  with pytest.raises(ValueError, match="git rev-parse"):
    list(candidates.from_history(str(history[0]), "nowhere", 1))
  with pytest.raises(ValueError, match="is no folder"):
    list(candidates.from_history(str(tmp_path / "not"), "HEAD", 1))


@pytest.mark.parametrize(
  ("reply", "reason"),
  [
    ('{"suitable": true}', ""),
    ('```json\n{"suitable": true, "reason": "x"}\n```', ""),
    (
      '{"suitable": false, "reason": "too vague"}',
      "judged unsuitable: too vague",
    ),
    ("Certainly!", "the judge's reply is not of the form"),
    ('{"suitable": "true"}', "the judge's reply is not of the form"),
  ],
)
def test_a_model_judges(history, reply, reason):
  asked = []

  def script(messages):
    asked.append(messages[-1]["content"])
    return {"role": "assistant", "content": reply}

  judge = filters.judged_by(lambda: policy.ScriptedPolicy(script))
  candidate = next(candidates.from_history(str(history[0]), "HEAD", 1))
  told = judge(candidate)
  assert told.startswith(reason) and bool(told) == bool(reason)
  assert candidate.patch in asked[0] and candidate.statement in asked[0]


def test_a_tree_is_what_git_stores(tmp_path):
  """Attributes, filters and hooks of a repository have no say."""
  files = {
    ".gitattributes": "*.txt export-ignore\n*.py filter=evil eol=crlf\n",
    "a.txt": "a\n",
    "b.py": "x\n",
    "c d/\u00e9.sh": "echo\n",
  }
  commit = repositories.commit(tmp_path, files, "Begin")
  repositories.git(tmp_path, "config", "filter.evil.smudge", "touch /tmp/evil")
  (tmp_path / "c d" / "\u00e9.sh").chmod(0o755)
  os.symlink("a.txt", tmp_path / "link")
  commit = repositories.commit(tmp_path, {}, "More")
  assert tree.read(tmp_path, commit) == tree.read(tmp_path, "HEAD")
  image = tree.read(tmp_path, commit)
  bare = workspaces.Workspace(
    box=repositories.sandbox("bubblewrap"), image=image
  )
  answer = bare.run(
    {"operation": "shell", "commands": ["ls -l 'c d'; cat link b.py | od -c"]}
  )
  assert answer.values["output"].startswith("total 4\n-rwxr-xr-x")
  assert "a  \\n   x  \\n" in answer.values["output"]


def test_misuse_is_told():
  for bad, told in (
    ({"workers": 0}, "workers=0"),
    ({"seconds": 0.0}, "seconds=0.0"),
    ({"only": "("}, "only='\\('"),
    ({"max_tasks": -1}, "max_tasks=-1"),
  ):
    with pytest.raises(ValueError, match=told):
      pipeline.CodeSynthesisConfig(**bad)
  with pytest.raises(ValueError, match="least_words=0"):
    filters.FilterConfig(least_words=0)
  with pytest.raises(ValueError, match="most_files=1000"):
    filters.FilterConfig(most_files=1000)


def test_a_change_of_thousands_of_files_is_rejected(tmp_path):
  name = "a_long_name_of_a_folder_" * 8
  files = {f"{name}/m{number}.py": "x = 1\n" for number in range(1500)}
  repositories.commit(tmp_path, {"a.py": "x = 1\n"}, "Begin")
  repositories.commit(
    tmp_path,
    {**files, "test_m.py": "def test_m():\n  pass\n"},
    "Thousands of modules that all are one",
  )
  (candidate,) = candidates.from_history(str(tmp_path), "HEAD", 10)
  told = filters.heuristics(candidate, filters.FilterConfig())
  assert told == "the patches touch too many files"
  long = dataclasses.replace(candidate, patch=candidate.patch * 50)
  told = filters.heuristics(long, filters.FilterConfig())
  assert told == "the patches are too long"
