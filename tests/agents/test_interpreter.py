"""Cells in a sandboxed Jupyter kernel."""

import asyncio
import time

import pytest

from dsv32_jax.agents import interpreter
from dsv32_jax.agents import sandbox
from tests.support import attacks


@pytest.fixture(scope="module", params=attacks.BACKENDS)
def kernel(request):
  box = attacks.make(request.param)
  if not box.has_unix_sockets:
    with pytest.raises(sandbox.SandboxError, match="unix sockets"):
      interpreter.Interpreter(box)
    pytest.skip("under Landlock only root has a kernel")
  with interpreter.Interpreter(
    box,
    cell_seconds=1.5,
    max_executions=1000,
    output_characters=200,
    files={"data.txt": "from outside"},
  ) as made:
    yield made


def test_state_stays_and_values_show(kernel):
  assert kernel.execute("x = 20 + 1") == interpreter.Cell(status="ok")
  assert kernel.execute("print('a'); x * 2").output == "a\n42\n"
  assert kernel.execute("open('data.txt').read()").output == "'from outside'\n"
  shell = "import subprocess; subprocess.check_output(['echo', 'hi'])"
  assert kernel.execute(shell).output == "b'hi\\n'\n"


def test_errors_are_told_and_state_survives(kernel):
  kernel.execute("y = 5")
  cell = kernel.execute("print('before')\ny / 0")
  assert cell.status == "error" and cell.output.startswith("before\n")
  assert (
    "ZeroDivisionError: division by zero"
    in kernel.execute(
      "import traceback\ntry: y / 0\nexcept Exception: traceback.print_exc()"
    ).output
  )
  assert "\x1b" not in cell.output
  assert kernel.execute("def (").status == "error"
  assert kernel.execute("y").output == "5\n"


def test_a_slow_cell_is_interrupted(kernel):
  kernel.execute("z = 7")
  begin = time.monotonic()
  cell = kernel.execute("import time\nprint('on it')\ntime.sleep(60)")
  assert 1.5 <= time.monotonic() - begin < 6
  assert (cell.status, cell.lost_state) == ("timeout", False)
  assert cell.output == "on it\n"
  assert cell.observation() == (
    "on it\n[The cell took too long and was interrupted.]"
  )
  assert kernel.execute("z").output == "7\n"


def test_a_cell_that_ignores_interrupts_costs_the_state(kernel):
  kernel.execute("z = 7")
  cell = kernel.execute(
    "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass"
  )
  assert (cell.status, cell.lost_state) == ("timeout", True)
  assert "NameError" in kernel.execute("z").output


def test_a_kernel_that_ends_is_replaced(kernel):
  kernel.execute("z = 7; open('kept', 'w').write('still here')")
  cell = kernel.execute("import os; os._exit(1)")
  assert (cell.status, cell.lost_state) == ("died", True)
  assert cell.observation() == "[The kernel died.]\n[All variables are lost.]"
  assert kernel.execute("open('kept').read()").output == "'still here'\n"


def test_output_is_cut(kernel):
  cell = kernel.execute("print('x' * 10**6)")
  assert cell.output == "x" * 200 and cell.truncated
  assert cell.observation().endswith("x\n[The output was longer.]")
  assert not kernel.execute("print('x' * 199)").truncated


def test_no_way_out(kernel):
  cell = kernel.execute(
    "import os, socket\n"
    "try: socket.create_connection(('127.0.0.1', 80), 1); print('LEAK')\n"
    "except OSError: print('no network')\n"
    "try: open('/etc/passwd'); print('LEAK')\n"
    "except OSError: print('no files')"
  )
  assert cell.output == "no network\nno files\n"


def test_killing_everything_stops_only_the_environment(kernel):
  cell = kernel.execute("import os; os.kill(-1, 9)")
  assert (cell.status, cell.lost_state) == ("stopped", True)
  assert kernel.execute("1 + 1").output == "2\n"


def test_executions_are_counted_and_checked():
  box = attacks.make("bubblewrap")
  none = interpreter.Interpreter(box, max_executions=0)
  assert none.execute("1").status == "refused"
  assert none.execute("1").observation() == "[No code executions are left.]"
  fresh = interpreter.Interpreter(box)
  assert fresh.executions_left == 20
  with pytest.raises(ValueError, match="string"):
    fresh.execute(b"1")
  assert fresh.executions_left == 20
  for bad in (
    {"cell_seconds": 0},
    {"max_executions": -1},
    {"output_characters": 0},
    {"output_characters": 10**9},
  ):
    with pytest.raises(ValueError, match=next(iter(bad))):
      interpreter.Interpreter(box, **bad)


def test_cancelling_a_cell_ends_the_kernel(kernel):
  async def cancelled():
    cell = asyncio.ensure_future(
      kernel.execute_async("import time; time.sleep(60.375)")
    )
    await asyncio.sleep(0.5)
    cell.cancel()
    with pytest.raises(asyncio.CancelledError):
      await cell
    return await kernel.execute_async("3")

  assert asyncio.run(cancelled()).output == "3\n"


def test_a_kernel_that_cannot_start_is_an_error():
  limits = sandbox.Limits(processes=1, cpu_seconds=None)
  small = interpreter.Interpreter(
    attacks.make("bubblewrap"), limits=limits, output_characters=1000
  )
  with pytest.raises(sandbox.SandboxError, match="no Jupyter kernel"):
    small.execute("1")
