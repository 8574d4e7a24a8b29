"""Programs: flags reach the config; a mistake costs one line and code 1."""

import json
import pathlib
import subprocess
import sys

from absl import flags
import numpy as np
import pytest

from experiments import common
from tests.support import echo_program

CONFIG = "--config=tests/support/echo_program.py"


def run(*arguments):
  root = pathlib.Path(__file__).parents[2]
  return subprocess.run(
    [sys.executable, "-m", echo_program.__name__, *arguments],
    cwd=root,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


def test_overrides_reach_the_config(tmp_path):
  done = run(
    f"{CONFIG}:long",
    f"--workdir={tmp_path / 'a' / 'b'}",
    "--config.part.limit=7",
    "--config.part.rate=2",
    "--config.source=text",
    "--config.parts[1].rate=3.5",
  )
  assert done.stderr == ""
  assert done.returncode == 0
  assert json.loads(done.stdout) == {
    "action": "print",
    "steps": 1000,
    "source": "text",
    "part": {"rate": 2.0, "limit": 7},
    "parts": [{"rate": 0.5, "limit": None}, {"rate": 3.5, "limit": None}],
  }
  assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ((), "--config"),
    ((CONFIG,), "--workdir"),
    ((CONFIG, "--workdir=W", "--nope=1"), "nope"),
    ((CONFIG, "--workdir=W", "extra"), "unexpected argument 'extra'"),
    (("--config=no_such_file.py", "--workdir=W"), "no_such_file.py"),
    (
      (CONFIG + ":x", "--workdir=W"),
      ":x: config has no variant 'x', only short, long",
    ),
    (
      (CONFIG, "--workdir=W", "--config.stepz=1"),
      "--config.stepz: the config has no field 'stepz'. Did you mean \"steps\"",
    ),
    (
      (CONFIG, "--workdir=W", "--config.part.nope.limit=1"),
      "--config.part.nope.limit: the config has no field 'nope'",
    ),
    ((CONFIG, "--workdir=W", "--config.steps=abc"), "config.steps"),
    ((CONFIG, "--workdir=W", "--config.part.limit=1.5"), "limit"),
    ((CONFIG, "--workdir=W", "--config.steps=-1"), "steps=-1 must not be"),
    ((CONFIG, "--workdir=setup.cfg"), "--workdir="),
    ((CONFIG, "--workdir=W", "--config.action=open"), "/no/such/file"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, told):
  replaced = [a.replace("=W", f"={tmp_path}") for a in arguments]
  done = run(*replaced)
  assert done.returncode == 1
  assert done.stdout == ""
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1
  assert told in done.stderr


def test_debug_shows_the_traceback(tmp_path):
  arguments = (CONFIG, f"--workdir={tmp_path}", "--config.steps=-1")
  done = run(*arguments, "--debug")
  assert done.returncode == 1
  assert "Traceback" in done.stderr
  assert "steps=-1 must not be negative" in done.stderr


@pytest.mark.parametrize("action", ["bug", "library"])
def test_a_bug_keeps_its_traceback(tmp_path, action):
  done = run(CONFIG, f"--workdir={tmp_path}", f"--config.action={action}")
  assert done.returncode == 1
  assert "Traceback" in done.stderr
  assert "echo_program.py" in done.stderr


def test_flags_in_a_notebook(tmp_path):
  for _ in range(2):
    common.define_common_flags()
    common.parse_flags([CONFIG, f"--workdir={tmp_path}", "--config.steps=9"])
  assert flags.FLAGS.config.steps == 9
  assert common.require_workdir() == tmp_path
  with pytest.raises(flags.Error, match="nope"):
    common.parse_flags(["--nope"])


def test_write_npz_is_whole_or_absent(tmp_path):
  path = tmp_path / "out.npz"
  common.write_npz(str(path), {"a": np.arange(3)})
  with np.load(path) as found:
    np.testing.assert_array_equal(found["a"], np.arange(3))

  class Unreadable:
    def __array__(self, *args, **kwargs):
      raise ValueError("no array")

  with pytest.raises(ValueError, match="no array"):
    common.write_npz(str(path), {"a": np.zeros(9), "b": Unreadable()})
  assert [item.name for item in tmp_path.iterdir()] == ["out.npz"]
  with np.load(path) as found:
    assert found["a"].shape == (3,)
  with pytest.raises(FileNotFoundError):
    common.write_npz(str(tmp_path / "none" / "out.npz"), {})
