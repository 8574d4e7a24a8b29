"""Questions that only code answers: their environment and their synthesis."""

import asyncio
import dataclasses
import json
import random
import sys

import pytest

from dsv32_jax.agents import interpreter as interpreters
from dsv32_jax.agents import tables
from dsv32_jax.agents.environments import interpreter
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.interpreter import checks
from dsv32_jax.agents.synthesis.interpreter import pipeline
from dsv32_jax.agents.synthesis.interpreter import problems
from tests.support import attacks

NAMES = [generator.__name__ for generator in checks.GENERATORS]
TASK = interpreter.InterpreterTask(
  id="t", kind="sum", statement="What is the sum?", answer="42"
)
PROBLEM = problems.Problem(
  kind="sum",
  statement="What is 17 more than 4711?",
  answer="123456",
  solution="print(123456)",
  work=5000,
)


def call(name, **arguments):
  return protocol.ToolCall(name=name, arguments=arguments)


def python(code):
  return call("python", code=code)


def environment(task=TASK, **options):
  box = attacks.make("bubblewrap")
  make = lambda files: interpreters.Interpreter(box, files=files, **options)
  return interpreter.InterpreterEnvironment(task, make, max_steps=9)


def test_an_episode_and_its_snapshot():
  task = dataclasses.replace(TASK, files={"numbers.txt": "20\n22\n"})

  async def play():
    played = environment(task, max_executions=3)
    with pytest.raises(RuntimeError, match="reset"):
      played.snapshot()
    start = await played.reset()
    assert start.observation == task.statement
    assert [tool.name for tool in start.tools] == ["python", "submit_result"]
    step = await played.step(
      python("x = sum(map(int, open('numbers.txt')))\nprint(x)")
    )
    assert step == protocol.Step(observation="42", done=False)
    step = await played.step(python("print('submitted', answer)"))
    assert "NameError" in step.observation
    step = await played.step(python("y = x + 1"))
    assert step.observation == "[The cell printed nothing.]"
    step = await played.step(python("1"))
    assert step.observation == "[No code executions are left.]"
    step = await played.step(call("python", source="1"))
    assert step.observation.startswith("error: arguments")
    assert await played.verify() == 0
    taken = json.loads(json.dumps(played.snapshot()))
    assert len(taken["state"]["cells"]) == 3
    step = await played.step(call("submit_result", answer_text=" 42\n"))
    assert step.done and await played.verify() == 1
    with pytest.raises(RuntimeError, match="done"):
      await played.step(python("1"))
    other = environment(task, max_executions=4)
    await other.restore(taken)
    assert await other.verify() == 0
    assert (await other.step(python("y"))).observation == "43"
    # Steps of the snapshot count: five there, one here, three to the ninth.
    for last in (False, False, True):
      assert (await other.step(call("nothing"))).done == last
    with pytest.raises(ValueError, match="snapshot"):
      await other.restore({**taken, "task": "another"})
    await played.reset()
    assert await played.verify() == 0
    for one in (played, other, other):
      await one.close()

  asyncio.run(play())


@pytest.mark.parametrize(
  ("text", "answer", "tolerance", "right"),
  [
    ("42", "42", 0.0, True),
    ("1, 2", "1,2", 0.0, True),
    ("1,2,", "1,2", 0.0, False),
    ("42.0", "42", 0.0, False),
    ("", "42", 0.0, False),
    ("42" + " " * 1000, "42", 0.0, False),
    ("0.33333333", "0.3333333333", 1e-6, True),
    ("+3.3333333e-1", "0.3333333333", 1e-6, True),
    ("0.3334", "0.3333333333", 1e-6, False),
    ("nan", "0.5", 1e-6, False),
    ("inf", "0.5", 1e-6, False),
    ("1e999", "0.5", 1e-6, False),
    ("1/2", "0.5", 1e-6, False),
    ("0x1p-1", "0.5", 1e-6, False),
    ("\u0660.5", "0.5", 1e-6, False),
    ("0.5 or so", "0.5", 1e-6, False),
  ],
)
def test_what_counts_as_right(text, answer, tolerance, right):
  task = dataclasses.replace(TASK, answer=answer, tolerance=tolerance)
  assert interpreter.accepts(task, text) == right


def test_misuse_is_told():
  with pytest.raises(ValueError, match="max_steps=0"):
    interpreter.InterpreterEnvironment(TASK, None, max_steps=0)
  with pytest.raises(ValueError, match="tolerance=1"):
    dataclasses.replace(TASK, tolerance=1.0)
  with pytest.raises(ValueError, match="is no answer"):
    dataclasses.replace(TASK, answer="many", tolerance=0.1)
  with pytest.raises(ValueError, match="num_tasks=0"):
    pipeline.InterpreterSynthesisConfig(num_tasks=0)
  with pytest.raises(ValueError, match="num_trajectories=-1"):
    pipeline.InterpreterSynthesisConfig(num_trajectories=-1)


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_two_computations_agree(place):
  """The generator's own, and the program's in the sandbox."""
  box = attacks.make("bubblewrap")
  generator, answers = checks.GENERATORS[place], set()
  for seed in range(3):
    problem = generator(random.Random(f"test/{seed}"))
    again = generator(random.Random(f"test/{seed}"))
    assert problem == again and problem.kind == NAMES[place]
    command = [sys.executable, "-I", "-c", problem.solution]
    ended = box.run(command, files=problem.files, limits=pipeline._LIMITS)
    assert ended.returncode == 0, ended.stderr[-500:]
    task = checks.task_of(problem, "x")
    assert interpreter.accepts(task, ended.stdout.decode()), problem.answer
    assert problem.work >= checks.LEAST_WORK
    if problem.tolerance == 0 and len(problem.answer) > 4:
      assert problem.answer not in problem.statement
    answers.add(problem.answer)
  assert len(answers) == 3


def test_what_is_too_easy_is_refused():
  place = NAMES.index("tour")
  refused = lambda **changed: checks.reason_to_reject(
    dataclasses.replace(PROBLEM, **changed), place
  )
  assert refused() == ""
  assert refused(work=10) == "too few steps lead to the answer"
  assert refused(shortcuts=("1", "123 456")) == "a shortcut gives the answer"
  for told in ("17", "4711", "4728", str(17 * 4711), "4694", "277,2", "2"):
    known = "" if told == "277,2" else "the statement's numbers give the answer"
    assert refused(answer=told) == known, told


def test_an_answer_that_others_have_is_refused(monkeypatch):
  monkeypatch.setattr(checks, "siblings", lambda place: ("123456",) * 2)
  reason = checks.reason_to_reject(PROBLEM, 0)
  assert reason == "questions of the kind often have this answer"


def test_computations_that_differ_are_told():
  differs = lambda solution: pipeline._differs(
    dataclasses.replace(PROBLEM, solution=solution), "x"
  )
  assert differs("print(123456)") == ""
  assert differs("print(123457)") == "two computations give two answers"
  assert differs("1 / 0") == "the solution ended with exit 1"


@pytest.mark.slow
def test_a_synthesis_is_continued_and_equal(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  for folder in (whole, parts):
    folder.mkdir()
  config = pipeline.InterpreterSynthesisConfig(num_tasks=18, workers=1)
  pipeline.run(config, whole)

  class StopError(Exception):
    pass

  def five(indices):
    for number in indices:
      if number == 5:
        raise StopError
      yield number

  with pytest.raises(StopError):
    pipeline.run(config, parts, five)
  path = parts / "candidates.jsonl"
  path.write_bytes(path.read_bytes()[:-20])
  # Two processes make the rest.
  pipeline.run(dataclasses.replace(config, workers=2), parts)
  name = "candidates.jsonl"
  assert (whole / name).read_bytes() == (parts / name).read_bytes()
  pipeline.export(whole, 2)
  report = pipeline.report(whole)
  assert report["tasks"] == 18 == report["answers"]
  assert report["trajectories"] == report["trajectories_rewarded"] == 2
  assert set(report["baselines"]) == {
    "number_of_statement",
    "answer_of_another",
  }
  rows = list(tables.read_jsonl(whole / "tasks.jsonl"))
  assert list(rows[0]) == pipeline.TASK_SCHEMA.names and len(rows) == 18
  assert len({row["kind"] for row in rows}) >= 15
  with pytest.raises(ValueError, match="was made with seed=0, not 1"):
    pipeline.run(dataclasses.replace(config, seed=1), whole)
