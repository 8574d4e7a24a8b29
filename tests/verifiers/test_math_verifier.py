"""Mathematical answers, and workers that hang, crash and are replaced."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dsv32_jax.verifiers import math as math_lib
from dsv32_jax.verifiers import workers


def behave(item):
  """A function of workers: echo, hang, crash, raise, or eat memory."""
  kind, value = item
  if kind == "hang":
    while True:
      value += 1
  if kind == "crash":
    os._exit(3)
  if kind == "raise":
    raise KeyError("line one\nline two")
  if kind == "signal":
    os.kill(os.getpid(), value)
    return value
  if kind == "eat":
    return len(bytearray(value))
  return value, os.getpid()


@pytest.fixture(scope="module")
def pool():
  with workers.WorkerPool(
    behave, num_workers=2, timeout_seconds=1.0, memory_bytes=8 * 2**30
  ) as pool:
    yield pool


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_stops_the_program_costs_no_score(pool, number):
  (outcome,) = pool.map([("signal", number)])
  assert outcome.value == number and not outcome.error


def run_program(path, text):
  """What a program of its own prints and how it ends."""
  path.write_text("from dsv32_jax.verifiers import workers\n" + text)
  return subprocess.run(
    [sys.executable, path],
    check=False,
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {"PYTHONPATH": os.getcwd()},
  )


def test_a_pool_that_nobody_closes_ends_with_its_program(tmp_path):
  finished = run_program(
    tmp_path / "program.py",
    "pool = workers.WorkerPool(abs, num_workers=1, timeout_seconds=60)\n"
    "print(pool.map([-1])[0].value, pool._idle[0].process.pid)\n",
  )
  assert finished.returncode == 0 and not finished.stderr
  value, pid = finished.stdout.split()
  assert value == "1"
  assert not pathlib.Path(f"/proc/{pid}").exists()


POOL_OF_A_PROGRAM = """
class Pair(tuple):
  def __abs__(self):
    return self[0] + self[1]
print("imported", __name__, flush=True)
if __name__ == "__main__":
  with workers.WorkerPool(abs, num_workers=1, timeout_seconds=60) as pool:
    print(pool.map([-1])[0].value, flush=True)
    print(pool.map(["if __name__ == '__main__'"])[0].error, flush=True)
    print([outcome.value for outcome in pool.map([-2, Pair((3, 4))])])
"""


def test_a_worker_imports_the_program_only_for_what_it_defines(tmp_path):
  finished = run_program(tmp_path / "program.py", POOL_OF_A_PROGRAM)
  assert finished.returncode == 0 and not finished.stderr
  assert finished.stdout.split("\n") == [
    "imported __main__",
    "1",
    "TypeError: bad operand type for abs(): 'str'",
    "imported __mp_main__",
    "[2, 7]",
    "",
  ]


def test_a_program_without_a_guard_starts_no_chain_of_workers(tmp_path):
  finished = run_program(
    tmp_path / "program.py",
    "def double(value):\n"
    "  return 2 * value\n"
    "pool = workers.WorkerPool(double, num_workers=1, timeout_seconds=60)\n"
    "print(pool.map([1]))\n",
  )
  assert finished.returncode == 1 and not finished.stdout
  assert finished.stderr.count("guard what the program runs") == 1
  assert finished.stderr.count("died as it started") == 1


def test_failures_cost_their_own_item_only(pool):
  begin = time.monotonic()
  items = [
    ("echo", 0),
    ("hang", 0),
    ("echo", 2),
    ("crash", 0),
    ("raise", 0),
    ("eat", 16 * 2**30),
    ("hang", 0),
    ("echo", 7),
  ]
  outcomes = pool.map(items)
  for place, outcome in enumerate(outcomes):
    kind, value = items[place]
    if kind == "echo":
      assert outcome.value[0] == value and not outcome.error
    else:
      assert outcome.value is None
  errors = [outcome.error for outcome in outcomes]
  assert errors[1] == errors[6] == "timeout after 1.0 s"
  assert errors[3] == "crash: exit code 3"
  assert errors[4] == "KeyError: 'line one\\nline two'"
  assert errors[5].startswith("MemoryError")
  assert time.monotonic() - begin < 60


def test_workers_are_kept_and_results_stay_in_order(pool):
  first = pool.map([("echo", i) for i in range(20)])
  again = pool.map([("echo", i) for i in range(20)])
  assert [outcome.value[0] for outcome in first] == list(range(20))
  processes = {outcome.value[1] for outcome in first + again}
  assert len(processes) <= 2
  assert pool.map([]) == []


def test_bad_pools():
  with pytest.raises(ValueError, match="num_workers=0"):
    workers.WorkerPool(behave, num_workers=0, timeout_seconds=1)
  with pytest.raises(ValueError, match="timeout_seconds=0"):
    workers.WorkerPool(behave, num_workers=1, timeout_seconds=0)
  with pytest.raises(ValueError, match=r"lambda.* reaches no new process"):
    workers.WorkerPool(lambda item: item, num_workers=1, timeout_seconds=1)
  pool = workers.WorkerPool(behave, num_workers=1, timeout_seconds=1)
  pool.close()
  with pytest.raises(ValueError, match="closed"):
    pool.map([("echo", 0)])


CASES = [
  ("\\boxed{42}", "42", 1),
  ("\\boxed{42}", "43", 0),
  ("\\boxed{\\frac{1}{2}}", "0.5", 1),
  ("\\boxed{\\dfrac{3}{6}}", "\\frac{1}{2}", 1),
  ("\\boxed{x^2+2x+1}", "(x+1)^2", 1),
  ("\\boxed{x^2+2x+2}", "(x+1)^2", 0),
  ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
  ("\\boxed{(1, 2)}", "(1,2)", 1),
  ("\\boxed{(2, 1)}", "(1,2)", 0),
  ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1),
  ("first \\boxed{42}, then \\boxed{43}", "42", 0),
  ("first \\boxed{43}, then \\boxed{42}", "42", 1),
  ("\\boxed{42} is what I think</think>It is \\boxed{7}.", "42", 0),
  ("\\boxed{42}</think>I do not know.", "42", 0),
  ("The answer is 42.", "42", 0),
  ("\\boxed{42", "42", 0),
  ("\\boxed{}", "42", 0),
  ("\\boxed{42} or \\boxed{", "42", 0),
  ("\\boxed{1000000}", "10^6", 1),
  ("\\boxed{-\\infty}", "\\infty", 0),
]
HANGS = "\\boxed{9^{9^{9^{9}}} + \\sqrt{9^{9^{9}}}}"


def test_math_answers():
  responses, truths, _ = zip(*CASES)
  with math_lib.MathVerifier(num_workers=1, timeout_seconds=5.0) as verifier:
    scores = verifier.score(
      [*responses, HANGS, "\\boxed{" + "9" * 3000 + "}", "\\boxed{5}"],
      [*truths, "1", "9", "5"],
    )
    with pytest.raises(ValueError, match="differs from"):
      verifier.score(["\\boxed{1}"], [])
  got = [score.value for score in scores]
  for case, value in zip(CASES, got):
    assert value == case[2], case
  # The tower costs its own zero; what comes after it is scored.
  assert got[-3:] == [0, 0, 1]
  assert scores[-2].error == "an answer of 3000 characters"
  unboxed = [s for s, case in zip(scores, CASES) if "oxed" not in case[0]]
  assert {score.error for score in unboxed} == {"no boxed answer"}
