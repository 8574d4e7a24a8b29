"""A repository worked on by calls, and the hidden tests that grade it."""

import asyncio
import dataclasses
import json

import pytest

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy
from dsv32_jax.agents.environments import code
from tests.support import code_repository as repositories

call = repositories.call


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns, by language, the built tree and the task of it."""
  box = repositories.sandbox("bubblewrap")
  names = ["python", *["javascript"] * repositories.has_node()]
  return {
    name: repositories.make(name, tmp_path_factory.mktemp(name), box)
    for name in names
  }


@pytest.mark.parametrize(
  "language",
  ["python", pytest.param("javascript", marks=repositories.needs_node)],
)
def test_a_fix_is_rewarded_and_nothing_else_is(made, language):
  workspace, task = made[language]
  assert repositories.play(workspace, task, [])[1].reward == 0
  path, text = repositories.FIX[language]
  seen, grade = repositories.play(
    workspace,
    task,
    [
      call("view", path=path),
      repositories.write(path, text),
      call("run_tests", files=[next(iter(task.hidden))]),
      call("submit"),
    ],
  )
  assert grade.reward == 1, grade
  assert seen[0].startswith("1\t") and "split(' ')" in seen[0]
  assert {"python": "1 passed", "javascript": "pass 1"}[language] in seen[2]
  assert seen[3] == "The work is submitted."


def test_landlock_serves_as_well(made):
  workspace, task = made["python"]
  box = repositories.sandbox("landlock")
  workspace = dataclasses.replace(workspace, box=box)
  fix = repositories.write(*repositories.FIX["python"])
  assert repositories.play(workspace, task, [fix])[1].reward == 1
  assert repositories.play(workspace, task, [])[1].reward == 0


def test_each_language_has_its_decoys(made):
  for language, (_, task) in made.items():
    assert len(task.must_fail) == 4, language


def test_a_command_finds_nothing_of_the_hidden_tests(made):
  workspace, task = made["python"]
  part = repositories.SECRET[1:]
  looks = (
    f"grep -rl '.{part}' . .. /tmp /dev/shm 2>/dev/null;"
    f"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null"
    " | tr '\\0' ' '; git log --all --format=%s"
  )
  seen, _ = repositories.play(workspace, task, [call("shell", command=looks)])
  assert "The tree as it is given" in seen[0]
  assert f"h{part}" not in seen[0]
  assert "test_spaces" not in seen[0]


def test_the_tree_stays_and_processes_do_not(made):
  workspace, task = made["python"]
  seen, _ = repositories.play(
    workspace,
    task,
    [
      call("shell", command="sleep 60.25 & echo $$; mkdir -p a/b; ln -s a c"),
      call("shell", command="pgrep -x sleep || ls -d a/b c; rm -r tests a"),
      call("edit", path="d/new.py", old_text="", new_text="x = 1\nx = 1\n"),
      call("edit", path="d/new.py", old_text="x = 1\n", new_text=""),
      call("edit", path="d/new.py", old_text="", new_text=""),
      call("view", path="d/new.py", first_line=2, last_line=2),
      call("view", path="nowhere"),
      call("shell", command="ls; exit 3"),
      call("shell", command="kill -9 $PPID; touch gone"),
      call("shell", command="ls gone"),
      call("shell", line="ls"),
      call("teleport"),
    ],
  )
  assert seen[1] == "a/b\nc"
  assert seen[3] == "error: d/new.py holds the old text 2 times"
  assert seen[4] == "error: d/new.py is there already"
  assert seen[5] == "2\tx = 1"
  assert seen[6] == "error: nowhere: No such file or directory"
  assert seen[7].split() == [
    *("README.md", "c", "counting", "d", "pytest.ini"),
    *("[exit", "code", "3]"),
  ]
  assert seen[8].startswith("error: the sandbox was stopped")
  assert "cannot access 'gone'" in seen[9]
  assert seen[10].startswith("error: arguments: $: ")
  assert seen[11].startswith("error: no tool 'teleport'")


def test_no_path_leads_out_of_the_tree(made):
  workspace, task = made["python"]
  paths = (
    "../image.tar",
    "/etc/ld.so.cache",
    "counting/../../image.tar",
    "up/image.tar",
    "/proc/self/environ",
    "a\0b",
    "\ud800",
    "x" * 5000,
  )
  seen, grade = repositories.play(
    workspace,
    task,
    [
      call("shell", command="ln -s .. up"),
      *(call("view", path=path) for path in paths),
      *(call("edit", path=p, old_text="", new_text="x") for p in paths),
      call("edit", path="up/new/file.py", old_text="", new_text="x"),
      call("view", path="counting/../counting/words.py"),
      repositories.write(*repositories.FIX["python"]),
    ],
  )
  for told in seen[1:-2]:
    assert told.startswith("error: "), told
    assert "sandbox was stopped" not in told, told
  assert seen[-2].startswith("1\tdef count")
  assert grade.reward == 1


def test_a_command_that_hangs_or_floods_is_ended(made):
  workspace, task = made["python"]
  quick = dataclasses.replace(workspace, seconds=1.0, characters=1000)
  seen, _ = repositories.play(
    quick,
    task,
    [
      call("shell", command="echo on it; touch kept; sleep 60"),
      call("shell", command="ls kept; yes | head -c 1000000; echo end"),
      call("shell", command="head -c 1000000000 /dev/zero > big; ls -s big"),
    ],
  )
  assert seen[0] == "on it\n[It took more than 1 s and was ended.]"
  assert seen[1].startswith("kept\ny\n") and seen[1].endswith("y\nend")
  assert "bytes left out" in seen[1] and len(seen[1]) < 1100
  assert "No space left" in seen[2]


def test_strange_trees_are_kept_or_refused(made):
  workspace, task = made["python"]
  deep = "mkdir -p " + "d/" * 300
  seen, grade = repositories.play(
    workspace,
    task,
    [
      repositories.write(*repositories.FIX["python"]),
      call("shell", command="touch $'a\\nb' $'\\xff' -- -rf ' '; mkfifo pipe"),
      call("shell", command="ln -s . loop; ln -s /x y; mkdir z; chmod 0 z"),
      call("shell", command=f"{deep}; rm -r counting"),
      call("shell", command="for i in $(seq 3000); do : > f$i; done; sleep 1"),
      call("shell", command="rm -r counting; mv ../repository ../other"),
      call("shell", command="mv ../repository ../o; ln -s /usr ../repository"),
      call("shell", command="ls -A | tr '\\n' ,; ls -d loop/loop/z"),
    ],
  )
  assert "error: the tree is not kept: folders are nested" in seen[3]
  assert "error: the sandbox was stopped (limit: files)" in seen[4]
  assert seen[5].startswith("error: the tree is not kept: ")
  assert seen[6] == "error: the tree is not kept: its folder is a link"
  names = " ,-rf,.git,README.md,a,b,counting,loop,pytest.ini,tests,y,z"
  assert sorted(seen[7].replace("\ufffd", "").split(",")) == sorted(
    [*names.split(","), "", "loop/loop/z"]
  )
  assert grade.reward == 1


def test_a_snapshot_continues(made):
  workspace, task = made["python"]

  async def episode():
    environment = code.CodeEnvironment(task, workspace, max_steps=4)
    with pytest.raises(RuntimeError, match="reset"):
      await environment.verify()
    await environment.reset()
    await environment.step(repositories.write(*repositories.FIX["python"]))
    await environment.step(call("shell", command="rm README.md"))
    taken = json.loads(json.dumps(environment.snapshot()))
    await environment.step(call("shell", command="rm -r counting"))
    assert await environment.verify() == 0
    other = code.CodeEnvironment(task, workspace, max_steps=4)
    await other.restore(taken)
    assert await other.verify() == 1
    assert not (await other.step(call("view", path="."))).done
    step = await other.step(call("view", path="."))
    assert step.done and "README" not in step.observation
    with pytest.raises(RuntimeError, match="done"):
      await other.step(call("submit"))
    with pytest.raises(ValueError, match="snapshot"):
      await other.restore({**taken, "task": "another"})
    with pytest.raises(ValueError, match="no delta"):
      await other.restore({**taken, "state": {"delta": {"archive": "?"}}})

  asyncio.run(episode())


def test_an_episode_of_a_policy(made):
  """Wrong calls are observations, and the answer is what the tree holds."""
  workspace, task = made["python"]
  path, text = repositories.FIX["python"]
  edit = {"path": path, "old_text": "split(' ')", "new_text": "split()"}
  script = policy.replies(
    policy.call("view", '{"path": 3}'),
    policy.call("edit", json.dumps(edit)),
    policy.call("submit", "{}"),
  )
  episode = asyncio.run(
    loop.run_episode(
      policy.ScriptedPolicy(script),
      lambda: code.CodeEnvironment(task, workspace),
      episode_id="1",
    )
  )
  assert edit["new_text"] in text
  result = episode.result
  assert (result.reward, result.finish, result.error) == (1.0, "done", "")
  assert (result.num_calls, result.num_bad_calls) == (2, 1)
  told = [m["content"] for m in result.messages if m["role"] == "tool"]
  assert told[0].startswith("error: ") and told[1:] == [
    "done",
    "The work is submitted.",
  ]
  shown = json.dumps(result.messages)
  assert repositories.SECRET not in shown and "test_spaces" not in shown


def test_misuse_is_told(made):
  workspace, task = made["python"]
  with pytest.raises(ValueError, match="max_steps=0"):
    code.CodeEnvironment(task, workspace, max_steps=0)
  with pytest.raises(ValueError, match="seconds=0"):
    dataclasses.replace(workspace, seconds=0)
  with pytest.raises(ValueError, match="must_pass names no test"):
    dataclasses.replace(task, must_pass=())
  with pytest.raises(ValueError, match="must do both"):
    dataclasses.replace(task, must_fail=task.must_pass)
  with pytest.raises(ValueError, match="'cobol' is none of python"):
    dataclasses.replace(task, language="cobol")
  broken = ("echo no compiler; exit 1",)
  with pytest.raises(ValueError, match="build fails: no compiler"):
    code.build(dataclasses.replace(task, setup=broken), workspace)
