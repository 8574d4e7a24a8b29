"""Hidden tests on what an agent left behind.

The tests and all that decides how they run are placed in a fresh sandbox, over
whatever the agent did to them. Of the agent's tree only what is neither enters
it. A process that the agent's code cannot reach reads the report once all
others have ended, and sends it under a nonce. Which tests have to pass, and
which to fail (see `decoys`), is known here only. Nothing that is printed, and
no exit code, counts.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from dsv32_jax.agents.repository import junit
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.repository import workspace as workspaces


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeTask:
  """What is to be done to a repository, and how it is told that it was.

  Attributes:
    id: of the task.
    language: a key of languages.LANGUAGES.
    repository: folder of a clone, for whoever reads the commit.
    commit: the tree an agent begins with.
    statement: what an agent is told.
    setup: command lines that build the tree before an agent sees it.
    hidden: test files, path to text, None for one that must not be there.
    must_pass: tests that a solution makes or leaves pass.
    must_fail: decoys among the hidden tests.
    patch: unified diff of the known solution; never shown.
    runner: command of a test run in the place of the language's, in the form of
      languages.Language.command; empty: the language's.
  """

  id: str
  language: str
  repository: str
  commit: str
  statement: str
  hidden: dict[str, str | None]
  must_pass: tuple[str, ...]
  must_fail: tuple[str, ...] = ()
  setup: tuple[str, ...] = ()
  patch: str = ""
  runner: tuple[str, ...] = ()

  def __post_init__(self):
    languages.find(self.language)
    check_runner(self.runner)
    if not self.must_pass:
      raise ValueError(f"task {self.id}: must_pass names no test")
    if overlap := set(self.must_pass) & set(self.must_fail):
      raise ValueError(f"task {self.id}: {sorted(overlap)[0]!r} must do both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grade:
  """What hidden tests say.

  Attributes:
    reward: 1.0 if all of must_pass passed and all of must_fail failed.
    reason: why it is not 1, one line, for people; never shown to an agent.
    forged: whether all seemed right but for a decoy that did not fail.
  """

  reward: float
  reason: str = ""
  forged: bool = False


def check_runner(runner: Sequence[str]) -> None:
  """Raises ValueError for a command that takes no files or gives no report."""
  text = " ".join(runner)
  if runner and ("{files}" not in runner or "{report}" not in text):
    raise ValueError(
      f"runner={text!r:.200} must have {{files}} as an argument, and {{report}}"
    )


def order(
  language: languages.Language,
  hidden: Mapping[str, str | None],
  runner: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns the order that runs hidden tests in a workspace.

  Args:
    language: of the tests.
    hidden: test files, path to text.
    runner: of a task, see CodeTask.
  """
  return {
    "operation": "grade",
    "keep": "nothing",
    "command": list(runner or language.command),
    "batches": language.batches(p for p, t in hidden.items() if t is not None),
    "hidden": dict(hidden),
    "protected": list(language.protected),
  }


def outcomes(
  language: languages.Language,
  hidden: Mapping[str, str | None],
  answer: workspaces.Answer,
) -> dict[str, str]:
  """Returns outcomes by test; none of a batch that left no report.

  Raises:
    ValueError: a report is no JUnit report.
  """
  found: dict[str, str] = {}
  batches = order(language, hidden)["batches"]
  reports = answer.values.get("reports", [])
  for files, report in zip(batches, reports, strict=bool(reports)):
    if report:
      prefix = files[0] if language.one_by_one else ""
      found |= junit.outcomes(report, prefix)
  return found


def judge(task: CodeTask, answer: workspaces.Answer) -> Grade:
  """Compares what came back with what the task demands."""
  language = languages.find(task.language)
  if answer.error:
    return Grade(reward=0.0, reason=answer.error)
  try:
    found = outcomes(language, task.hidden, answer)
  except ValueError as error:
    return Grade(reward=0.0, reason=str(error))
  for name in task.must_pass:
    if found.get(name) != "passed":
      return Grade(reward=0.0, reason=f"{name} is {found.get(name, 'missing')}")
  for name in task.must_fail:
    state = found.get(name, "missing")
    if state != "failed":
      reason = f"{name} is {state}, which has to fail"
      return Grade(reward=0.0, reason=reason, forged=True)
  return Grade(reward=1.0)


def grade(
  task: CodeTask, workspace: workspaces.Workspace, delta: workspaces.Delta
) -> Grade:
  """Grades a tree; see the module."""
  language = languages.find(task.language)
  return judge(
    task, workspace.run(order(language, task.hidden, task.runner), delta)
  )


async def grade_async(
  task: CodeTask, workspace: workspaces.Workspace, delta: workspaces.Delta
) -> Grade:
  """Is `grade` without waiting in this thread."""
  language = languages.find(task.language)
  whole = order(language, task.hidden, task.runner)
  return judge(task, await workspace.run_async(whole, delta))
