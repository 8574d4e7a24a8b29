"""A model that finds out how a tree is built and its tests are run.

It looks around the bare tree with a shell and hands in command lines that build
it and a command that runs tests to a JUnit report. What counts is not what it
says but what comes of them from the bare tree on: `validate` builds, runs the
tests before and after the known solution, and lets pass only fail-to-pass above
0 and pass-to-fail of 0. Neither the patches nor the hidden tests are shown.
Paper section 3.2.3.
"""

import asyncio
from collections.abc import Callable
import functools

from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import code
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.repository import grading
from dsv32_jax.agents.repository import languages
from dsv32_jax.agents.repository import workspace as workspaces
from dsv32_jax.agents.sandbox import limits as limits_lib
from dsv32_jax.agents.sandbox import run
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis import desk
from dsv32_jax.agents.synthesis.code import candidates
from dsv32_jax.agents.synthesis.code import validate

_LINES = {"type": "array", "items": {"type": "string"}, "maxItems": 40}
HAND_IN = protocol.tool(
  "hand_in_setup",
  "Hands in the command lines that build the tree, from its bare state on, and"
  " the test command, an argument each: one is {files}, and {report} stands for"
  " the path of the JUnit report. An empty test command is the usual one.",
  {"setup": _LINES, "test_command": _LINES},
)
_HELP = tuple(x for x in code.TOOLS if x.name in ("shell", "view"))
_CHECKER = tools.CallChecker((*_HELP, HAND_IN))
_PROMPT = """The current folder holds a repository in {language}. Find out how
it is built and how its tests are run, then hand that in. There is no network:
what is not in the tree has to be on the machine. Tests are files like those of
the tree; the usual test command is

{command}

Some tests have to fail before a known change and pass after it, and none the
other way about; you are told where that does not come out."""


class SetupDesk(desk.Desk):
  """Where a setup is handed in; see protocol.Environment."""

  def __init__(
    self,
    candidate: candidates.Candidate,
    bare: workspaces.Workspace,
    check: Callable[..., tuple],
    max_steps: int,
  ):
    """Takes the tree.

    Args:
      candidate: whose tree it is.
      bare: its tree before the patch.
      check: function of setup and runner that gives what `validate` does.
      max_steps: after as many calls an episode is done.
    """
    language = languages.find(candidate.language)
    prompt = _PROMPT.format(
      language=language.name, command="\n".join(language.command)
    )
    schemas = (*_HELP, HAND_IN)
    super().__init__(candidate.id, prompt, schemas, _CHECKER, max_steps)
    self._bare, self._check = bare, check
    self._delta = workspaces.Delta()

  async def help(self, call: protocol.ToolCall) -> str:
    answer = await self._bare.run_async(
      code.order_of(call.name, call.arguments, ()), self._delta
    )
    if answer.delta is not None:
      self._delta = answer.delta
    return code.observation_of(call.name, answer, self._bare.seconds)

  async def check(self, setup, test_command):
    runner = tuple(test_command)
    try:
      grading.check_runner(runner)
      return await asyncio.to_thread(
        self._check, setup=tuple(setup), runner=runner
      )
    except validate.Rejection as rejection:
      raise tools.ToolError(f"{rejection.stage}: {rejection}") from rejection
    except ValueError as error:
      raise tools.ToolError(str(error)) from error


def prepared_by(
  make_policy: Callable[[], policies.Policy], turns: int
) -> Callable[..., tuple]:
  """Returns what takes the place of `validate.validate` in the pipeline.

  Args:
    make_policy: gives the model; a client of a server is one for each call.
    turns: replies of the model on one candidate.
  """

  def prepare(
    candidate: candidates.Candidate,
    box: run.Sandbox,
    *,
    setup: tuple[str, ...],
    limits: limits_lib.Limits,
    seconds: float,
  ):
    bare = validate.bare_tree(candidate, box, limits, seconds)
    given = setup
    check = functools.partial(
      validate.validate, candidate, box, limits=limits, seconds=seconds
    )

    def check_all(setup, runner):
      return check(setup=(*given, *setup), runner=runner)

    place = SetupDesk(candidate, bare, check_all, 2 * turns)
    bounds = loop.EpisodeLimits(
      turns=turns,
      # A build and three runs of the tests, each with room around it.
      environment_seconds=8 * (seconds + 60),
      seconds=10 * turns * (seconds + 60),
    )
    episode = asyncio.run(
      loop.run_episode(
        make_policy(),
        lambda: place,
        episode_id=candidate.id,
        limits=bounds,
      )
    )
    if place.handed_in is None:
      told = authoring.unfinished(episode.result)
      last = f"; last: {place.refusals[-1]}" if place.refusals else ""
      raise validate.Rejection("setup", f"{told}{last}")
    return place.handed_in

  return prepare
