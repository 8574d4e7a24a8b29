"""Whether hidden tests tell the known solution from the tree before it.

The touched test files run on the tree before and after the patch of the
sources, each time as an agent's tree is graded. A pair becomes a task only if
tests go from failing to passing and none from passing to failing (paper,
section 3.2.3). Then decoys are added that fail on the solution (`decoys`), and
it is run once more, which tells tests that do not always end the same.
"""

from collections.abc import Mapping
import dataclasses
import time

from dsv32_jax.agents.environments import code
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.repository import tree
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import run
from dsv32_jax.agents.synthesis.code import candidates


class Rejection(Exception):
  """A candidate that is not kept.

  Attributes:
    stage: where it fell: "build", "patch", "tests", "flaky" or "setup".
  """

  def __init__(self, stage: str, reason: str):
    super().__init__(" ".join(reason.split())[:300])
    self.stage = stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """How tests end before and after the known solution.

  Attributes:
    fail_to_pass: failing, or not there, before; passing after.
    pass_to_pass: passing on both.
    pass_to_fail: passing before and not after.
    decoys: tests among the hidden that have to fail.
  """

  fail_to_pass: int = 0
  pass_to_pass: int = 0
  pass_to_fail: int = 0
  decoys: int = 0


def validate(
  candidate: candidates.Candidate,
  box: run.Sandbox,
  *,
  setup: tuple[str, ...] = (),
  limits: limits_lib.Limits | None = None,
  seconds: float = 300.0,
  runner: tuple[str, ...] = (),
) -> tuple[grading.CodeTask, Counts, dict[str, float]]:
  """Builds a candidate's tree and runs its tests.

  Args:
    candidate: that passed the filters.
    box: where all of it runs.
    setup: command lines that build the tree.
    limits: of each run; None: workspace.default_limits.
    seconds: of each command.
    runner: of the tests, see grading.CodeTask.

  Returns:
    The task, how its tests end, and seconds by part.

  Raises:
    Rejection: it makes no task.
  """
  clock = _Clock()
  bare = bare_tree(candidate, box, limits, seconds)
  try:
    built = code.build_tree(setup, bare)
  except ValueError as error:
    raise Rejection("build", str(error)) from error
  clock.note("build")
  gold = _applied(built, candidate.patch, "patch of the sources")
  hidden = _hidden(built, candidate)
  clock.note("patch")
  language = languages.find(candidate.language)
  runs = [
    _outcomes(built, language, hidden, delta, runner)
    for delta in (workspaces.Delta(), gold)
  ]
  clock.note("tests")
  counts, must_pass, fixed = compare(*runs)
  names = [test.split("::")[-1] for test in fixed]
  with_decoys = language.with_decoys(hidden, names, candidate.id)
  again = _outcomes(built, language, with_decoys, gold, runner)
  clock.note("decoys")
  for test in must_pass:
    if again.get(test) != "passed":
      state = again.get(test, "missing")
      raise Rejection("flaky", f"{test} passed once and then is {state}")
  known = runs[0].keys() | runs[1].keys()
  decoys = [t for t, s in again.items() if t not in known and s == "failed"]
  if not decoys:
    raise Rejection("tests", "no decoy fails on the solution")
  task = grading.CodeTask(
    id=candidate.id,
    language=candidate.language,
    repository=candidate.repository,
    commit=candidate.commit,
    statement=candidate.statement,
    hidden=with_decoys,
    must_pass=tuple(must_pass),
    must_fail=tuple(sorted(decoys)),
    setup=setup,
    patch=candidate.patch,
    runner=runner,
  )
  return task, dataclasses.replace(counts, decoys=len(decoys)), clock.seconds


def bare_tree(
  candidate: candidates.Candidate,
  box: run.Sandbox,
  limits: limits_lib.Limits | None,
  seconds: float,
) -> workspaces.Workspace:
  """Returns the tree before the patch, not built; Rejection if there is none.

  Args: as of `validate`.
  """
  return workspaces.Workspace(
    box=box,
    image=_read(candidate),
    limits=limits or workspaces.default_limits(),
    seconds=seconds,
  )


def compare(
  before: Mapping[str, str], after: Mapping[str, str]
) -> tuple[Counts, list[str], list[str]]:
  """Compares outcomes by test: counts, what has to pass, what was fixed.

  Raises:
    Rejection: nothing was fixed, or something was broken.
  """
  passed = {
    when: {test for test, state in found.items() if state == "passed"}
    for when, found in (("before", before), ("after", after))
  }
  fixed = sorted(passed["after"] - passed["before"])
  broken = sorted(passed["before"] - passed["after"])
  counts = Counts(
    fail_to_pass=len(fixed),
    pass_to_pass=len(passed["before"] & passed["after"]),
    pass_to_fail=len(broken),
  )
  if broken:
    states = f"{broken[0]} is {after.get(broken[0], 'missing')} after the patch"
    raise Rejection("tests", f"{len(broken)} pass-to-fail: {states}")
  if not fixed:
    raise Rejection("tests", "no fail-to-pass")
  return counts, sorted(passed["after"]), fixed


def _read(candidate) -> bytes:
  try:
    commit = tree.resolve(candidate.repository, candidate.commit)
    return tree.read(candidate.repository, commit)
  except ValueError as error:
    raise Rejection("build", str(error)) from error


def _applied(workspace, patch, what) -> workspaces.Delta:
  answer = workspace.run({"operation": "apply", "patch": patch})
  if answer.error or answer.values["code"] != 0:
    told = answer.error or answer.values["output"]
    raise Rejection("patch", f"the {what} does not apply: {told}")
  return answer.delta


def _hidden(workspace, candidate) -> dict[str, str | None]:
  """Returns the test files as the patch leaves them."""
  paths = {f.path for f in candidates.patched_files(candidate.test_patch)}
  try:
    texts = _applied(workspace, candidate.test_patch, "patch of the tests")
    found = texts.texts()
  except ValueError as error:
    raise Rejection("patch", f"the patch of the tests: {error}") from error
  return {path: text for path, text in found.items() if path in paths}


def _outcomes(workspace, language, hidden, delta, runner) -> dict[str, str]:
  answer = workspace.run(grading.order(language, hidden, runner), delta)
  if answer.error:
    raise Rejection("tests", answer.error)
  try:
    return grading.outcomes(language, hidden, answer)
  except ValueError as error:
    raise Rejection("tests", str(error)) from error


class _Clock:
  """Seconds by part, each from the note before it to its own."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._since = time.monotonic()

  def note(self, part: str) -> None:
    now = time.monotonic()
    self.seconds[part] = round(now - self._since, 3)
    self._since = now
