"""Functions called in a sandboxed process that stays."""

import asyncio
import time

import pytest

from dsv32_jax.agents import sandbox
from dsv32_jax.agents.sandbox import processes
from tests.support import attacks

SOURCE = """
import os, sys, time
held = []
def add(a, b=1):
  print("noise")
  return a + b
def hold(value):
  held.append(value)
  return held
def fail(): raise KeyError("two\\nlines")
def leave(): sys.exit(3)
def die(): os._exit(1)
def sleep(seconds): time.sleep(seconds)
def large(size): return "x" * size
def nan(): return float("nan")
def thing(): return object()
def fork():
  if os.fork() == 0:
    time.sleep(600)
  return "parent"
def eat(size):
  blocks = [b"x" * (1 << 20) for _ in range(size >> 20)]
  time.sleep(5)
  return len(blocks)
def speak(data):
  # Out of turn, over the worker's own socket.
  os.write(int(sys.argv[1]), bytes.fromhex(data))
  time.sleep(600)
"""
LIMITS = sandbox.Limits(
  wall_seconds=2.0, cpu_seconds=None, memory_bytes=300 << 20
)


@pytest.fixture(scope="module", params=attacks.BACKENDS)
def worker(request):
  box = attacks.make(request.param)
  with sandbox.Worker(box, SOURCE, limits=LIMITS) as made:
    yield made


def test_values_and_errors(worker):
  assert worker.call("add", {"a": 2}) == sandbox.Reply(value=3)
  assert worker.call("add", {"a": "x", "b": "\u00e9\n"}).value == "x\u00e9\n"
  assert worker.call("fail", {}).error == r"KeyError: 'two\nlines'"
  assert worker.call("none", {}).error == "NameError: no function 'none'"
  assert "unexpected keyword" in worker.call("add", {"a": 1, "c": 2}).error
  assert worker.call("leave", {}).error == "SystemExit: 3"
  assert "not JSON compliant" in worker.call("nan", {}).error
  assert "not JSON serializable" in worker.call("thing", {}).error
  assert len(worker.call("large", {"size": 900_000}).value) == 900_000


def test_what_it_holds_lasts_until_it_ends(worker):
  first = worker.call("hold", {"value": 1}).value
  assert worker.call("hold", {"value": 2}).value == [*first, 2]
  starts = worker.starts
  died = worker.call("die", {})
  assert (died.value, died.reason) == (None, "exit") and died.error
  assert worker.call("hold", {"value": 3}).value == [3]
  assert worker.starts == starts + 1


def test_limits_end_the_process_and_the_next_call_works(worker):
  begin = time.monotonic()
  assert worker.call("sleep", {"seconds": 60}).reason == "wall"
  assert 2 <= time.monotonic() - begin < 4
  assert worker.call("large", {"size": 2 << 20}).reason == "output"
  assert worker.call("add", {"a": 1}).value == 2


def test_memory_of_the_tree_ends_it(worker):
  source = SOURCE + (
    "\ndef eat_many(size):\n"
    "  for _ in range(3):\n"
    "    if os.fork() == 0:\n"
    "      eat(size)\n"
    "      os._exit(0)\n"
    "  time.sleep(30)\n"
  )
  with sandbox.Worker(worker._box, source, limits=LIMITS) as eater:
    # Each stays below the limit of one process, all of them above it.
    assert eater.call("eat_many", {"size": 150 << 20}).reason == "memory"
    alone = eater.call("eat", {"size": 400 << 20})
    assert alone.error == "MemoryError:"


@pytest.mark.parametrize(
  "data",
  [
    b"\0\0\0\2{}",
    b"\0\0\0\3NaN",
    b"\0\0\0\4\xff\xfe\0\0",
    b"\0\1\0\0" + b"[" * 65536,
    b'\0\0\0\x0f[999,"value",1]',
    b"\0\0\0\x0a" + b"1" * 10,
  ],
)
def test_nonsense_is_no_answer(worker, data):
  reply = worker.call("speak", {"data": data.hex()})
  assert reply.value is None and reply.error, reply


def test_an_announced_flood_is_not_read(worker):
  begin = time.monotonic()
  assert worker.call("speak", {"data": "ffffffff"}).reason == "output"
  assert time.monotonic() - begin < 1


def test_a_module_that_fails_is_an_error_each_time(worker):
  with sandbox.Worker(worker._box, "def (:") as broken:
    assert broken.call("f", {}).error.startswith("SyntaxError")
    assert broken.call("f", {}).error.startswith("SyntaxError")
    assert broken.starts == 2


def test_arguments_are_checked(worker):
  for arguments in ({"a": float("inf")}, {"a": object()}, [1]):
    with pytest.raises(ValueError):
      worker.call("add", arguments)
  with pytest.raises(ValueError, match="must be a string"):
    sandbox.Worker(worker._box, b"")


def test_cancelling_a_call_ends_it(worker):
  async def cancelled():
    call = asyncio.ensure_future(worker.call_async("sleep", {"seconds": 60}))
    await asyncio.sleep(0.2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
      await call
    return await worker.call_async("add", {"a": 1})

  begin = time.monotonic()
  assert asyncio.run(cancelled()).value == 2
  assert time.monotonic() - begin < 2


def test_forked_children_do_not_outlive_it(worker):
  with sandbox.Worker(worker._box, SOURCE, limits=LIMITS) as forker:
    assert forker.call("fork", {}).value == "parent"
    root = forker._connection._running.process.pid
    assert len(processes.descendants(root)) >= 2
    kept = processes.descendants(root)
  assert not [pid for pid in kept if attacks.command_line(pid)]


def test_calls_are_fast(worker):
  worker.call("add", {"a": 0})
  begin = time.monotonic()
  values = [worker.call("add", {"a": a}).value for a in range(1000)]
  assert values == list(range(1, 1001))
  # Far below what an idle core does, as CI is no idle core.
  assert time.monotonic() - begin < 2
