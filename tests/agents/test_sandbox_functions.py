"""Functions tried in processes of their own: nothing outlives its call."""

import asyncio

import pytest

from dsv32_jax.agents.sandbox import functions
from tests.support import attacks

ADD = "f = lambda a, b: a + b"
CASES = [[1, 2], [3, 4]]


@pytest.fixture(scope="module", params=attacks.BACKENDS)
def tried(request):
  box = attacks.make(request.param)
  with functions.Functions(box, seconds=4.0) as made:
    yield lambda program: made.call(program, "f", CASES)


def test_values(tried):
  assert tried(ADD) == functions.Outputs(values=[3, 7])
  assert tried("def f(a, b):\n  return [a, str(b)]").values == [
    [1, "2"],
    [3, "4"],
  ]
  assert tried("print('x' * 100_000)\nf = max").values == [2, 4]


@pytest.mark.parametrize(
  "program, error",
  [
    ("f = lambda a b", "SyntaxError"),
    ("g = 1", "KeyError: 'f'"),
    ("f = 1", "not callable"),
    ("f = lambda a: a", "positional argument"),
    ("f = lambda a, b: 1 // 0", "ZeroDivisionError"),
    ("f = lambda a, b: f(a, b)", "RecursionError"),
    ("f = lambda a, b: {1}", "not JSON serializable"),
    ("f = lambda a, b: float('nan')", "not JSON compliant"),
    ("f = lambda a, b: 'x' * (1 << 32)", "MemoryError"),
    ("import os\nf = lambda a, b: os.fork()", "BlockingIOError"),
    ("f = lambda a, b: exit(0)", "SystemExit: 0"),
    ("f = '\udc80'", "not callable"),
    (
      "def f(a, b): raise ValueError(chr(0xD800) + '\\n' + 'x' * 999)",
      ": ? xxx",
    ),
    (
      'import json\njson.dumps = lambda *_, **__: \'{"error": "a\\\\nb"}\''
      "\nf = max",
      "a b",
    ),
  ],
)
def test_what_a_program_does_wrong_is_told(tried, program, error):
  found = tried(program)
  assert found.values is None and not found.ended
  assert error in found.error and "\n" not in found.error
  assert len(found.error.encode()) <= 300


@pytest.mark.parametrize(
  "program, ended",
  [
    ("f = lambda a, b: [0 for _ in iter(int, 1)]", ("cpu", "wall")),
    ("f = lambda a, b: 10 ** 10 ** 9", ("cpu", "wall")),
    ("import time\nf = lambda a, b: time.sleep(60)", ("wall",)),
    ("import os\nf = lambda a, b: os._exit(0)", ("exit",)),
    ("import os\nf = lambda a, b: os.abort()", ("signal 6",)),
    ("f = lambda a, b: 'x' * 100_000", ("output",)),
    (
      "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile 1: pass",
      ("cpu", "wall", "signal 9"),
    ),
    # Writes to its pipe itself; there is none else beyond stderr.
    (
      "import os\nfor fd in range(3, 99):\n  try: os.write(fd, b'{}')"
      "\n  except OSError: pass\nos._exit(0)",
      ("output",),
    ),
  ],
)
def test_what_does_not_answer_is_ended(tried, program, ended):
  found = tried(program)
  assert found.values is None and found.ended in ended, found
  assert tried(ADD).values == [3, 7]


@pytest.mark.parametrize(
  "program",
  [
    # The program's own memory, its parent's, and the parent's socket.
    "import builtins, json\njson.dumps = lambda *a, **k: '{\"values\": [0]}'",
    "import sys\nsys.modules['tools'].values = None",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import os, sys\nos.write(int(sys.argv[1]), b'\\0\\0\\0\\1[')",
    "open('left.py', 'w').write('x')\nf = lambda a, b: 0",
  ],
)
def test_the_next_program_meets_nothing_of_the_last(tried, program):
  tried(program)
  seen = "import os, json\nf = lambda a, b: json.dumps([a, b])"
  tried(seen)
  assert tried(ADD).values == [3, 7]
  assert tried(seen).values == ["[1, 2]", "[3, 4]"]


@pytest.mark.parametrize(
  "program",
  [
    # What fills the folder would end whoever comes next.
    "for n in range(12): open(f'{n}', 'wb').write(bytes(80_000))",
    "import os\nfor n in range(12): os.mkdir(f'{n}')",
    "open('/dev/shm/left', 'w').write('x')",
    "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "import os\nos.sched_setscheduler("
    "os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    "import os\nos.sched_setaffinity("
    "os.getppid(), [min(os.sched_getaffinity(0))])",
    "open('full', 'wb').write(bytes(3_000_000))",
  ],
)
def test_a_program_leaves_nothing_around_the_next(tried, program):
  seen = (
    "import os\ndef names(folder):\n  try:\n    return os.listdir(folder)"
    "\n  except OSError:\n    return None\n"
    "f = lambda a, b: [names('.'), names('/dev/shm'), os.sched_getscheduler(0),"
    " os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0))]"
  )
  before = tried(seen)
  assert before.values[0][0] == []
  tried(program)
  # Long enough for its surroundings to be looked at.
  slow = "import time\nend = time.monotonic() + 0.2"
  slow += "\nwhile time.monotonic() < end: pass\n"
  assert tried(slow + ADD).values == [3, 7]
  tried(program)
  assert tried(seen) == before


def test_a_program_cannot_open_the_memory_of_the_process_that_stays(tried):
  program = (
    "import os\ndef f(a, b):\n  try:\n    open(f'/proc/{os.getppid()}/mem',"
    " 'r+b')\n  except PermissionError:\n    return 0\n  return 1"
  )
  assert tried(program).values == [0, 0]


def test_many_wait_for_each_other():
  async def play():
    shared = functions.shared()
    assert shared is functions.shared()
    return await asyncio.gather(
      *(shared.call_async(f"f = lambda: {n}", "f", [[]]) for n in range(8))
    )

  assert [one.values for one in asyncio.run(play())] == [[n] for n in range(8)]
