"""Runs in a sandbox: what goes in and out, and what is refused before."""

import asyncio
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pytest

from dsv32_jax.agents import sandbox
from dsv32_jax.agents.sandbox import probing
from tests.support import attacks

PYTHON = [sys.executable, "-I", "-c"]


@pytest.fixture(scope="module", params=attacks.BACKENDS)
def box(request):
  return attacks.make(request.param)


def test_what_goes_in_comes_out(box):
  script = """if True:
    import os, sys
    print(open("a/b.txt").read() + sys.stdin.read(), end="")
    print("err", file=sys.stderr)
    os.write(int(os.environ["RESULT_FD"]), b"yes\\n")
    sys.exit(3)
  """
  result = box.run([*PYTHON, script], files={"a/b.txt": "one "}, stdin="two")
  assert (result.stdout, result.stderr) == (b"one two", b"err\n")
  assert (result.results, result.returncode) == (b"yes\n", 3)
  assert result.reason == "exit" and 0 < result.seconds < 10


def test_much_goes_in_and_out(box):
  data = bytes(range(256)) * 2000
  result = box.run(["/bin/cat"], stdin=data)
  assert result.stdout == data


def test_stdin_that_nobody_reads(box):
  result = box.run(["/bin/true"], stdin=b"x" * 500_000)
  assert (result.reason, result.returncode) == ("exit", 0)


def test_given_files_can_be_changed_and_vanish(box):
  script = "echo more >> d/f && mkdir d/e && mv d/f d/e/f && cat d/e/f"
  for _ in range(2):
    result = box.run(["/bin/sh", "-c", script], files={"d/f": "text\n"})
    assert result.stdout == b"text\nmore\n", result


def test_signals_and_missing_programs_have_a_shells_codes(box):
  killed = box.run(["/bin/sh", "-c", "kill -9 $$"])
  assert (killed.returncode, killed.reason) == (137, "exit")
  assert box.run(["/no/such/program"]).returncode in (126, 127)


def test_variables_are_the_sandboxs_own(box, monkeypatch):
  monkeypatch.setenv("API_KEY", "secret")
  result = box.run(["/usr/bin/env"])
  assert b"API_KEY" not in result.stdout and b"secret" not in result.stdout
  assert b"PATH=/usr/bin:/bin\n" in result.stdout


def test_runs_side_by_side(box):
  async def several():
    begin = time.monotonic()
    runs = [box.run_async(["/bin/sleep", "0.5"]) for _ in range(6)]
    results = await asyncio.gather(*runs)
    return results, time.monotonic() - begin

  results, seconds = asyncio.run(several())
  assert [r.returncode for r in results] == [0] * 6
  assert seconds < 6 * 0.5


def test_cancelling_ends_the_processes(box):
  async def cancelled():
    script = f"sleep 60; echo {attacks.MARK}"
    run = asyncio.ensure_future(box.run_async(["/bin/sh", "-c", script]))
    await asyncio.sleep(0.3)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
      await run

  begin = time.monotonic()
  asyncio.run(cancelled())
  assert time.monotonic() - begin < 5
  assert not attacks.processes_with(attacks.MARK)


def test_limits_and_arguments_are_checked(box):
  for bad in (
    {"wall_seconds": 0},
    {"wall_seconds": float("nan")},
    {"wall_seconds": "1"},
    {"cpu_seconds": 0},
    {"memory_bytes": 1.5},
    {"processes": 0},
    {"output_bytes": -1},
    {"open_files": True},
  ):
    with pytest.raises(ValueError, match=next(iter(bad))):
      sandbox.Limits(**bad)
  for argv in ([], "ls", ["a\0b"], [""], [1], ["x" * 200_000]):
    with pytest.raises(ValueError):
      box.run(argv)
  for name in ("/a", "../a", "a/../../b", "", ".", "a\0", "x" * 300):
    with pytest.raises(ValueError, match="inside the folder"):
      box.run(["/bin/true"], files={name: ""})
  with pytest.raises(ValueError, match="also a folder"):
    box.run(["/bin/true"], files={"a": "", "a/b": ""})
  with pytest.raises(ValueError, match="disk_bytes"):
    box.run(
      ["/bin/true"],
      files={"a": b"x" * 5000},
      limits=sandbox.Limits(disk_bytes=4096),
    )
  with pytest.raises(ValueError, match="absolute path"):
    sandbox.Sandbox(None, readable=["relative"])


def test_the_probe_takes_the_first_that_works():
  found = sandbox.probe()
  assert found.require() is found.backend
  assert "20 ms" in found.memory_bound and "NPROC" in found.process_bound


def test_without_a_sandbox_nothing_runs():
  def missing():
    raise sandbox.SandboxError("not\nhere")

  found = probing.choose({"first": missing, "second": missing})
  assert found.refusals == {"first": "not here", "second": "not here"}
  with pytest.raises(sandbox.SandboxError, match="first: not here; second"):
    found.require()


def test_a_sandbox_that_leaks_is_refused():
  class Leaky:
    has_unix_sockets = False

    def start(self, argv, **options):
      backend = attacks.make("bubblewrap")._backend
      options["readable"] = [*options["readable"], os.path.dirname(argv[4])]
      return backend.start(argv, **options)

  with pytest.raises(sandbox.SandboxError, match="reads the host's files"):
    probing._tested(Leaky())


@pytest.mark.parametrize("name", attacks.BACKENDS)
def test_nothing_outlives_the_one_who_started_it(name):
  # The lengths tell these sleeps from others of the machine.
  length = f"60.{os.getpid()}"
  script = f"setsid sleep {length} & sleep {length}; echo {attacks.MARK}"
  program = f"""if True:
    from tests.support import attacks
    from dsv32_jax.agents import sandbox
    box = attacks.make({name!r})
    limits = sandbox.Limits(wall_seconds=100)
    box.run(["/bin/sh", "-c", {script!r}], limits=limits)
  """
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    host = subprocess.Popen(
      [sys.executable, "-c", program],
      cwd=pathlib.Path(__file__).parents[2],
      env={"TMPDIR": folder, "PATH": "/usr/bin:/bin"},
    )
    try:
      assert within(
        20, lambda: len(attacks.processes_with(f"sleep\0{length}")) == 2
      )
    finally:
      host.kill()
      host.wait()
    for text in (attacks.MARK + "\0", length):
      assert within(5, lambda text=text: not attacks.processes_with(text))
    assert within(5, lambda: not os.listdir(folder))


def within(seconds: float, condition) -> bool:
  """Returns whether a condition comes true in this time."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.02)
  return False


def test_what_no_kernel_takes_is_refused(box):
  with pytest.raises(ValueError, match="memory_bytes"):
    sandbox.Limits(memory_bytes=1 << 70)
  with pytest.raises(ValueError, match="too long"):
    box.run(["/bin/true"], files={"a/" * 3000 + "b": "x"})
  with pytest.raises(ValueError, match="files and folders"):
    box.run(["/bin/true"], files={"a/" * 450 + "b": "x"})
