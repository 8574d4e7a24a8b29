"""The cgroup of a run: where one can be made, and in a folder that mimics one.

The folder shows which files are written, when, and what with; that the kernel
obeys is shown where this process may make a cgroup.
"""

import os
import pathlib
import shutil
import sys

import pytest

from dsv32_jax.agents import sandbox
from dsv32_jax.agents.sandbox import cgroups
from dsv32_jax.agents.sandbox import probing
from tests.support import attacks

LIMITS = sandbox.Limits(
  memory_bytes=1 << 30, processes=20, disk_bytes=8 << 20, cpu_seconds=None
)
WANTED = {
  "memory.max": str((1 << 30) + (8 << 20) + (32 << 20)),
  "memory.oom.group": "1",
  "pids.max": "22",
  "cgroup.kill": "1",
}


class Mimic:
  """A folder in the place of /sys/fs/cgroup; `removed` has groups' files."""

  def __init__(self, root: pathlib.Path, monkeypatch):
    self.root, self.own = root, root / "own"
    self.events = "oom_kill 0"
    self.removed: list[dict[str, str]] = []
    (root / "mine" / "leaf").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory pids")
    for name, handed in (("mine", "cpu memory pids"), ("mine/leaf", "")):
      (root / name / "cgroup.subtree_control").write_text(handed)
    self.own.write_text("3:pids:/other\n0::/mine/leaf\n")
    mkdir = pathlib.Path.mkdir

    def make(path, *arguments, **options):
      mkdir(path, *arguments, **options)
      if path.parent.parent == root:
        (path / "memory.events").write_text(f"oom 1\n{self.events}\n")

    def remove(path):
      files = {file.name: file.read_text() for file in path.iterdir()}
      self.removed.append(files)
      shutil.rmtree(path)

    monkeypatch.setattr(pathlib.Path, "mkdir", make)
    monkeypatch.setattr(pathlib.Path, "rmdir", remove)

  def find(self):
    return cgroups.find(self.root, self.own)

  def is_clear(self) -> bool:
    return [p.name for p in (self.root / "mine").iterdir() if p.is_dir()] == [
      "leaf"
    ]


@pytest.fixture
def mimic(tmp_path, monkeypatch):
  tmp_path.chmod(0o755)
  return Mimic(tmp_path, monkeypatch)


def test_groups_lie_beside_the_own_one(mimic):
  """That has a process and hands nothing down, as the kernel demands."""
  assert mimic.find() == mimic.root / "mine"
  (tried,) = mimic.removed
  assert tried["cgroup.procs"] == "0\n" and mimic.is_clear()
  asked = (mimic.root / "mine/leaf/cgroup.subtree_control").read_text()
  assert asked == "+memory +pids"


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lambda root: (root / "cgroup.controllers").unlink(), "no cgroup of"),
    (lambda root: (root / "own").write_text("1:pids:/a\n"), "none that can"),
    (lambda root: (root / "own").write_text("0::/../a\n"), "none that can"),
    (
      lambda root: (root / "mine/cgroup.subtree_control").write_text("pids"),
      "mine: it hands down no memory",
    ),
  ],
)
def test_why_there_is_none_is_told(mimic, change, told):
  change(mimic.root)
  with pytest.raises(sandbox.SandboxError, match=told):
    mimic.find()


def test_the_probe_says_what_holds_the_memory(mimic, monkeypatch):
  choose = lambda: probing.choose({}).memory_bound
  monkeypatch.setattr(cgroups, "found", lambda: (None, "it is read-only"))
  assert "20 ms" in choose() and "run: it is read-only" in choose()
  monkeypatch.setattr(cgroups, "found", lambda: (mimic.find(), ""))
  assert choose().startswith("memory.max of a cgroup")


@pytest.mark.parametrize("name", attacks.BACKENDS)
def test_a_run_joins_its_group_and_takes_it_away(mimic, monkeypatch, name):
  box = attacks.make(name)
  monkeypatch.setattr(cgroups, "found", lambda: (mimic.root / "mine", ""))
  result = box.run(["/bin/echo", "here"], limits=LIMITS)
  assert (result.stdout, result.reason) == (b"here\n", "exit")
  (files,) = mimic.removed
  assert files["cgroup.procs"].strip() == "0"
  assert WANTED.items() <= files.items() and mimic.is_clear()
  # What cannot be started leaves none either.
  monkeypatch.setattr(
    box._backend.__class__, "start", lambda *_, **__: 1 / 0, raising=True
  )
  with pytest.raises(ZeroDivisionError):
    box.run(["/bin/true"])
  assert len(mimic.removed) == 2 and mimic.is_clear()


@pytest.mark.parametrize("name", attacks.BACKENDS)
def test_what_the_kernel_ends_for_memory_is_told(mimic, monkeypatch, name):
  box = attacks.make(name)
  monkeypatch.setattr(cgroups, "found", lambda: (mimic.root / "mine", ""))
  mimic.events = "oom_kill 2"
  result = box.run(["/bin/sh", "-c", "kill -9 $$"], limits=LIMITS)
  assert (result.reason, result.returncode) == ("memory", None)
  source = "import os\ndef die():\n  os.kill(os.getpid(), 9)\n"
  with sandbox.Worker(box, source, limits=LIMITS) as worker:
    assert worker.call("die", {}).reason == "memory"
  assert len(mimic.removed) == 2 and mimic.is_clear()


@pytest.mark.skipif(
  cgroups.found()[0] is None,
  reason=f"this process makes no cgroup: {cgroups.found()[1]}",
)
@pytest.mark.parametrize("name", attacks.BACKENDS)
def test_the_kernel_holds_a_tree(monkeypatch, name):
  """Ten processes of 200 MiB under 256, with nobody polling."""
  parent, _ = cgroups.found()
  monkeypatch.setattr(sandbox.run, "POLL_SECONDS", 60.0)
  script = """if True:
    import os, time
    for _ in range(10):
      if os.fork() == 0:
        held = b"x" * (200 << 20)
        time.sleep(30)
        os._exit(0)
    time.sleep(30)
  """
  limits = sandbox.Limits(wall_seconds=20.0, memory_bytes=256 << 20)
  command = [sys.executable, "-I", "-c", script]
  result = attacks.make(name).run(command, limits=limits)
  assert result.reason == "memory" and result.seconds < 15
  assert not list(parent.glob(f"sandbox-{os.getpid()}-*"))
