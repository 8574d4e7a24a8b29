"""Parts in processes of their own: all run, all stop, none is left."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.support import attacks
from tests.support import parts

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pids(folder, *names):
  return [int((folder / name).read_text()) for name in names]


def until(happened):
  end = time.monotonic() + 120
  while not happened():
    assert time.monotonic() < end
    time.sleep(0.1)


def test_every_part_runs_once_in_processes_that_stay(tmp_path):
  names, told = [f"part_{n}" for n in range(5)], []
  parts.run(tmp_path, names, done=told.append)
  assert sorted(told) == names
  found = pids(tmp_path, *names)
  assert len(set(found)) == 2 and os.getpid() not in found
  logs = [(tmp_path / f"log_{n}.log").read_text() for n in (1, 2)]
  assert sorted("".join(logs).split("\n")) == [
    "",
    *(f"{n} begins" for n in names),
  ]
  assert not any(map(attacks.command_line, found))


@pytest.mark.parametrize(
  ("name", "error", "told"),
  [
    ("wrong", ValueError, "^wrong: two lines$"),
    ("bug", RuntimeError, "^bug: KeyError: 'x'; see .*log"),
    ("dies", RuntimeError, "^dies: its process died; see .*log"),
  ],
)
def test_a_part_that_fails_is_told_and_ends_the_others(
  tmp_path, name, error, told
):
  with pytest.raises(error, match=told):
    parts.run(tmp_path, ["waits", name, "later"])
  # What was under way was asked to save itself, unless it had hardly begun.
  if (tmp_path / "waits").exists():
    assert (tmp_path / "waits.saved").exists()
    assert not any(map(attacks.command_line, pids(tmp_path, "waits")))
  assert not (tmp_path / "later").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_part_outlives_who_waits_for_it(tmp_path, number):
  names = ("waits_1", "waits_2")
  program = subprocess.Popen(
    [sys.executable, "-m", "tests.support.parts", str(tmp_path)],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  until(lambda: all((tmp_path / n).exists() for n in names))
  found = pids(tmp_path, *names)
  program.send_signal(number)
  _, errors = program.communicate(timeout=120)
  until(lambda: not any(map(attacks.command_line, found)))
  in_order = number == signal.SIGTERM
  for name in names:
    assert (tmp_path / f"{name}.saved").exists() == in_order
  assert ("Stopped: stopped with 2 parts under way" in errors) == in_order
  assert not (tmp_path / "later").exists()
