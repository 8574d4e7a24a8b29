"""A whole synthesis of interpreter tasks that a model writes.

A model writes a problem with a program that prints its answer. The program is
run in the sandbox twice and has to print the same; replies without any tool
must all be wrong, or the problem needs no execution; and a solver with the
interpreter has to arrive at the answer, by itself, within some attempts. The
files are those of the procedural synthesis (`pipeline`). Paper section 3.2.3
has mathematics, logic and data science, with Jupyter for the interpreter.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from typing import Any

from dsv32_jax.agents import interpreter as interpreters
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import sandbox
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import interpreter
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis import desk
from dsv32_jax.agents.synthesis.interpreter import checks

SUBJECTS = ("mathematics", "logic", "data science", "simulation", "text")
_MAX_STEPS = 40
_MOST_STATEMENT, _MOST_PROGRAM, _MOST_FILES = 4000, 10_000, 50_000
_LIMITS = sandbox.Limits(
  wall_seconds=60.0, cpu_seconds=60, memory_bytes=2 << 30
)
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}$"
_TEXT = {"type": "string"}
HAND_IN = protocol.tool(
  "hand_in_problem",
  "Hands in a problem, and Python that prints its answer alone. Files"
  " go by name to text; tolerance is relative, and 0 where the answer is text.",
  {
    "statement": _TEXT,
    "files": {
      "type": "object",
      "propertyNames": {"pattern": _NAME},
      "additionalProperties": _TEXT,
      "maxProperties": 5,
    },
    "solution": _TEXT,
    "tolerance": {"type": "number", "minimum": 0, "maximum": 0.01},
  },
)
_CHECKER = tools.CallChecker((HAND_IN,))
_PROMPT = """Write a problem of {subject} that nobody solves without running
code: the answer takes thousands of steps, or lies in a file that goes with it.
The statement says all that decides and the form of the answer, which is short,
and not the answer. The same program always prints the same. Hand it in with a
program that prints the answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpreterAuthoringConfig(authoring.AuthoringConfig):
  """What a model is asked to write.

  Attributes:
    subjects: of problems, taken in turn.
    guesses: replies without tools, all of which must be wrong.
    attempts: a task is kept if one of so many attempts solves it.
    num_trajectories: solutions played in a kernel, of the first tasks.
  """

  subjects: tuple[str, ...] = SUBJECTS
  guesses: int = 3
  attempts: int = 10
  num_trajectories: int = 100

  def __post_init__(self):
    super().__post_init__()
    if not self.subjects:
      raise ValueError("subjects=() must name one at least")
    for name, least in (
      ("guesses", 1),
      ("attempts", 1),
      ("num_trajectories", 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f"{name}={getattr(self, name)} must be at least {least}"
        )


class ProblemDesk(desk.Desk):
  """Where a problem is handed in, which then has its `answer`."""

  def __init__(self, subject: str, box: sandbox.Sandbox):
    """Takes a subject, and where programs run."""
    prompt = _PROMPT.format(subject=subject)
    super().__init__(subject, prompt, (HAND_IN,), _CHECKER, _MAX_STEPS)
    self._subject, self._box = subject, box

  async def check(
    self, statement, files, solution, tolerance
  ) -> dict[str, Any]:
    if not statement.strip() or len(statement) > _MOST_STATEMENT:
      raise tools.ToolError(
        f"a statement has 1 to {_MOST_STATEMENT} characters"
      )
    size = sum(map(len, files.values()))
    if len(solution) > _MOST_PROGRAM or size > _MOST_FILES:
      raise tools.ToolError(
        f"a program has at most {_MOST_PROGRAM} characters, and all files"
        f" {_MOST_FILES}"
      )
    answer = await self._printed(solution, files)
    if await self._printed(solution, files) != answer:
      raise tools.ToolError("the program does not print the same twice")
    if authoring.tells_answer(statement, answer):
      raise tools.ToolError("the statement tells the answer")
    problem = {
      "statement": statement,
      "files": dict(files),
      "answer": answer,
      "solution": solution,
      "tolerance": float(tolerance),
    }
    try:
      task_of(problem, "handed-in", self._subject)
    except ValueError as error:
      raise tools.ToolError("what it prints is no answer") from error
    return problem

  async def _printed(self, solution, files):
    ended = await self._box.run_async(
      [sys.executable, "-I", "-c", solution], files=files, limits=_LIMITS
    )
    if ended.returncode != 0:
      told = ended.stderr.decode("utf-8", "replace").strip()[-200:]
      raise tools.ToolError(
        f"the program ended with {ended.reason} {ended.returncode}: {told}"
      )
    return ended.stdout.decode("utf-8", "replace").strip()


def task_of(
  problem: Mapping[str, Any], name: str, subject: str
) -> interpreter.InterpreterTask:
  """Returns the task of a problem; ValueError if its answer is none."""
  return interpreter.InterpreterTask(
    id=name,
    kind=subject,
    statement=f"{problem['statement']}\n\n{checks.INSTRUCTION}",
    files=dict(problem["files"]),
    answer=problem["answer"],
    tolerance=problem["tolerance"],
  )


def run(
  config: InterpreterAuthoringConfig,
  workdir: pathlib.Path,
  author: policies.Policy,
  solver: policies.Policy,
  box: sandbox.Sandbox,
  progress: authoring.Progress = iter,
) -> None:
  """Has problems written until there are enough; see authoring.fill.

  Args:
    config: what to make.
    workdir: folder of this synthesis.
    author: writes problems.
    solver: guesses without tools, and solves with them.
    box: where programs run.
    progress: wraps the numbers of tasks that are still to be made.
  """
  taken = authoring.kept_fingerprints(workdir)
  make = functools.partial(candidate, config, author, solver, box, taken)
  authoring.fill(config, workdir, "interpreter", make, progress)


async def candidate(
  config: InterpreterAuthoringConfig,
  author: policies.Policy,
  solver: policies.Policy,
  box: sandbox.Sandbox,
  taken: set[str],
  row_id: str,
  index: int,
) -> dict[str, Any]:
  """Has one problem written; returns its row without the id.

  Args:
    config: what to make.
    author: see `run`.
    solver: see `run`.
    box: see `run`.
    taken: fingerprints of problems that are there; grows by this.
    row_id: of the row.
    index: of the subject.
  """
  subject = config.subjects[index % len(config.subjects)]
  place = ProblemDesk(subject, box)
  episode = await loop.run_episode(
    author, lambda: place, episode_id=row_id, limits=config.limits()
  )
  row = {"kind": subject, "fingerprint": "", "refusals": place.refusals}
  problem = place.handed_in
  if problem is None:
    return _rejected(row, "check", authoring.unfinished(episode.result))
  content = json.dumps([problem["statement"], problem["files"]]).encode()
  row["fingerprint"] = hashlib.sha256(content).hexdigest()[:16]
  if row["fingerprint"] in taken:
    return _rejected(row, "equal", "it equals another question")
  taken.add(row["fingerprint"])
  task = task_of(problem, row_id, subject)
  reason, used = await _tried(config, solver, box, task)
  if reason:
    taken.discard(row["fingerprint"])
    return _rejected(row, "solver", reason)
  return {
    **row,
    "status": "kept",
    "task": dataclasses.asdict(task),
    "solution": problem["solution"],
    "work": 0,
    "baselines": {"without_tools": False},
    "attempts_until_solved": used,
  }


async def _tried(config, solver, box, task):
  """Returns why a task is not kept or "", and the attempts it took."""
  for _ in range(config.guesses):
    guess = await policies.ask(
      solver, f"{task.statement}\n\nThere are no tools: reply the answer alone."
    )
    last = (guess.strip().splitlines() or [""])[-1]
    if any(interpreter.accepts(task, text) for text in (guess, last)):
      return "it is solved without running anything", 0
  make_kernel = functools.partial(_kernel, box)
  for attempt in range(1, config.attempts + 1):
    episode = await loop.run_episode(
      solver,
      lambda: interpreter.InterpreterEnvironment(task, make_kernel),
      episode_id=f"{task.id}/{attempt}",
      limits=config.limits(),
    )
    if episode.result.reward > 0:
      return "", attempt
  return f"pass@{config.attempts} is zero", 0


def _kernel(box, files):
  return interpreters.Interpreter(box, files=files)


def _rejected(row, stage, reason):
  return {**row, "status": "rejected", "stage": stage, "reason": reason}
