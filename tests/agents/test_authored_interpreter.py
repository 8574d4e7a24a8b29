"""Interpreter problems that a policy writes: what passes and what does not."""

import dataclasses
import json

import pytest

from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tables
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis.interpreter import authored
from dsv32_jax.agents.synthesis.interpreter import pipeline
from tests.support import attacks
from tests.support.authors import say

CONFIG = authored.InterpreterAuthoringConfig(
  num_tasks=1, max_candidates=1, guesses=2, attempts=2, turns=12
)
NUMBERS = [n * n % 97 for n in range(400)]
PROBLEM = {
  "statement": "Add up the numbers of numbers.txt that are above 40.",
  "files": {"numbers.txt": "\n".join(map(str, NUMBERS))},
  "solution": (
    "numbers = map(int, open('numbers.txt').read().split())\n"
    "print(sum(n for n in numbers if n > 40))\n"
  ),
  "tolerance": 0,
}
ANSWER = sum(n for n in NUMBERS if n > 40)


@pytest.fixture(scope="module")
def box():
  return sandbox.Sandbox(attacks.find("bubblewrap"))


def author(*changes):
  return policies.ScriptedPolicy(
    policies.replies(
      *(say("hand_in_problem", **{**PROBLEM, **change}) for change in changes)
    )
  )


def solver(guess="7", answer=str(ANSWER)):
  """Guesses where there are no tools, and runs code where there are."""

  def script(messages):
    if messages[0]["role"] == "user":
      return {"role": "assistant", "content": guess}
    said = sum(message["role"] == "assistant" for message in messages)
    code = say("python", code=PROBLEM["solution"])
    return [code, say("submit_result", answer_text=answer)][said]

  return policies.ScriptedPolicy(script)


def made(workdir, box, writes, solves):
  authored.run(CONFIG, workdir, writes, solves, box)
  (row,) = authoring.rows(workdir)
  return row


def test_a_problem_is_kept_and_played(tmp_path, box):
  wrong = [
    ({"solution": "print(1/0)"}, "ended with exit 1"),
    ({"solution": "import time\nprint(time.perf_counter_ns())"}, "same twice"),
    ({"solution": "print()"}, "what it prints is no answer"),
    ({"solution": "print('many')", "tolerance": 0.001}, "is no answer"),
    ({"statement": f"Is it {ANSWER}?"}, "the statement tells the answer"),
    ({"files": {"../numbers.txt": "1"}}, ""),
    ({"files": {"numbers.txt": "1" * 60_000}}, "all files 50000"),
    ({"tolerance": 0.5}, ""),
  ]
  writes = author(*(change for change, _ in wrong), {})
  row = made(tmp_path, box, writes, solver())
  assert row["status"] == "kept" and row["attempts_until_solved"] == 1
  assert row["task"]["answer"] == str(ANSWER)
  # What does not fit the tool's schema does not get as far.
  told = [want for _, want in wrong if want]
  assert len(row["refusals"]) == len(told)
  for refusal, want in zip(row["refusals"], told):
    assert want in refusal
  pipeline.export(tmp_path, 1)
  (played,) = tables.read_jsonl(tmp_path / "trajectories.jsonl")
  assert played["reward"] == 1.0
  (task,) = tables.read_jsonl(tmp_path / "tasks.jsonl")
  assert json.loads(task["files"]) == PROBLEM["files"]
  assert pipeline.report(tmp_path)["tasks"] == 1


@pytest.mark.parametrize(
  ("solves", "reason"),
  [
    (solver(guess=f"It is\n{ANSWER}"), "solved without running anything"),
    (solver(answer="7"), "pass@2 is zero"),
  ],
)
def test_what_is_too_easy_or_too_hard_is_not_kept(
  tmp_path, box, solves, reason
):
  row = made(tmp_path, box, author({}), solves)
  assert (row["status"], row["stage"]) == ("rejected", "solver")
  assert reason in row["reason"]
  pipeline.export(tmp_path, 1)
  (told,) = tables.read_jsonl(tmp_path / "rejections.jsonl")
  assert told["reason"] == row["reason"]


def test_scripts_that_misbehave(tmp_path, box):
  silent = policies.ScriptedPolicy(
    policies.replies({"role": "assistant", "content": "No."})
  )
  row = made(tmp_path, box, silent, solver())
  assert row["reason"].endswith("the episode ended with answered")
  stubborn = author(*[{"solution": "while True: pass"}] * 12)
  path = tmp_path / "second"
  path.mkdir()
  fast = dataclasses.replace(CONFIG, turns=2)
  with pytest.MonkeyPatch.context() as patch:
    short = dataclasses.replace(authored._LIMITS, wall_seconds=0.3)
    patch.setattr(authored, "_LIMITS", short)
    authored.run(fast, path, stubborn, solver(), box)
  (row,) = authoring.rows(path)
  assert row["reason"].endswith("the episode ended with max_turns")
  assert "ended with wall None" in row["refusals"][0]


def test_a_problem_is_there_once(tmp_path, box):
  more = dataclasses.replace(CONFIG, num_tasks=2, max_candidates=3)
  made(tmp_path, box, author({}), solver())
  path = tmp_path / authoring.CANDIDATES_FILE
  whole = path.read_bytes()
  path.write_bytes(whole + whole[:30])
  authored.run(more, tmp_path, author({}), solver(), box)
  rows = authoring.rows(tmp_path)
  assert [row["status"] for row in rows] == ["kept", "rejected", "rejected"]
  assert rows[2]["reason"] == "it equals another question"
  assert path.read_bytes().startswith(whole)
