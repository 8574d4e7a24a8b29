"""One episode: the model replies, tools answer, until it is over.

What the model does wrong it is told, as an observation. What an environment
does wrong, raising or hanging, costs this episode and no other. What a policy
raises is not the episode's fault and is raised.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import dataclasses
import inspect
import logging
import math
from typing import Any, Protocol

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import limits as limits_lib
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import protocol

_LOG = logging.getLogger(__name__)

FINISHES = (
  "answered",  # a reply without tool calls
  "done",  # the environment says so
  "max_turns",
  "max_tokens",
  "wall_time",
  "crashed",  # the environment raised or hung
)


EpisodeLimits = limits_lib.EpisodeLimits


@dataclasses.dataclass(kw_only=True)
class EpisodeResult:
  """What came of an episode; `row` makes it JSON.

  Attributes:
    id: of the episode.
    reward: what the environment says, 0 where it crashed.
    finish: one of FINISHES.
    error: what an environment raised, in one line.
    num_turns: replies of the model.
    num_calls: tool calls that reached the environment.
    num_bad_calls: calls that were wrong, and replies not of the format.
    num_written_tokens: of the replies, where known.
    num_context_changes: how often context management stepped in.
    seconds: of wall time.
    messages: of the conversation in the end.
  """

  id: str
  reward: float = 0.0
  finish: str = ""
  error: str = ""
  num_turns: int = 0
  num_calls: int = 0
  num_bad_calls: int = 0
  num_written_tokens: int = 0
  num_context_changes: int = 0
  seconds: float = 0.0
  messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def row(self) -> dict[str, Any]:
    """Returns the result as JSON-able values."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
  """A result, and the conversation for whoever trains on it."""

  result: EpisodeResult
  conversation: conversations.Conversation


class ContextManager(Protocol):
  """Makes room in a conversation; see `context.py`."""

  async def __call__(
    self,
    conversation: conversations.Conversation,
    policy: policies.Policy,
    *,
    num_tokens: int,
    window: int,
  ) -> bool:
    """Returns whether it changed the conversation."""


MakeEnvironment = Callable[
  [], protocol.Environment | Awaitable[protocol.Environment]
]


class _EnvironmentError(Exception):
  """An environment raised or hung; one line."""


async def run_episode(
  policy: policies.Policy,
  make_environment: MakeEnvironment,
  *,
  episode_id: str,
  limits: EpisodeLimits = EpisodeLimits(),
  thinking_mode: str = "thinking",
  system_prompt: str = "",
  describe: Callable[[Sequence[protocol.ToolSchema]], str] | None = None,
  manage_context: ContextManager | None = None,
) -> Episode:
  """Runs one episode to its end.

  Args:
    policy: what replies.
    make_environment: function, coroutine function or not, that gives the
      environment of this episode, which is closed in the end.
    episode_id: of the result.
    limits: bounds.
    thinking_mode: "thinking" or "chat".
    system_prompt: before the description of the tools.
    describe: the tools as text; None: as the chat format has them.
    manage_context: called before each reply; None: the window is the end.

  Raises:
    ValueError: no such mode.
    Exception: whatever the policy raised.
  """
  run = _Run(policy, limits, thinking_mode, EpisodeResult(id=episode_id))
  try:
    await run.episode(make_environment, system_prompt, describe, manage_context)
  except _EnvironmentError as error:
    run.result.finish, run.result.error = "crashed", str(error)
    run.result.reward = 0.0
    _LOG.warning("episode %s: %s", episode_id, error)
  finally:
    await run.close()
  run.result.seconds = asyncio.get_running_loop().time() - run.begun
  run.result.messages = run.conversation.messages
  return Episode(result=run.result, conversation=run.conversation)


class _Run:
  """The state of one episode."""

  def __init__(self, policy, limits, thinking_mode, result):
    self.policy, self.limits, self.result = policy, limits, result
    self.conversation = conversations.Conversation(
      policy.tokenizer, thinking_mode
    )
    self.begun = asyncio.get_running_loop().time()
    self._environment: protocol.Environment | None = None
    # Of the last reply and what it continued; all there is behind an API.
    self._last_tokens = 0

  async def episode(
    self, make_environment, system_prompt, describe, manage_context
  ):
    """Fills in the result."""
    self._environment = await self._within(make_environment, "is made")
    start = await self._within(self._environment.reset, "resets")
    checker = tools.CallChecker(start.tools)
    if system_prompt or start.tools:
      system = {"role": "system", "content": system_prompt}
      if describe is None:
        system["tools"] = checker.descriptions()
      else:
        system["content"] += describe(start.tools)
      self.conversation.add(system)
    self.conversation.add({"role": "user", "content": start.observation})
    while not self.result.finish:
      self.result.finish = await self._turn(checker, manage_context)
    reward = await self._within(self._environment.verify, "verifies")
    if not math.isfinite(reward):
      raise _EnvironmentError(f"{reward=} is not finite")
    self.result.reward = float(reward)

  async def close(self) -> None:
    """Closes the environment; what goes wrong there is only logged."""
    if self._environment is None:
      return
    try:
      await self._within(self._environment.close, "closes")
    except _EnvironmentError as error:
      _LOG.warning("episode %s: %s", self.result.id, error)

  async def _turn(self, checker, manage_context) -> str:
    """One reply and what follows from it; returns the finish, if it is one."""
    if self.result.num_turns >= self.limits.turns:
      return "max_turns"
    deadline = self.begun + self.limits.seconds
    if asyncio.get_running_loop().time() >= deadline:
      return "wall_time"
    try:
      async with asyncio.timeout_at(deadline) as timeout:
        await self._manage(manage_context)
        room = self.limits.window - self._num_tokens()
        if room <= 0:
          return "max_tokens"
        completion = await self.policy.complete(
          self.conversation, max_tokens=min(room, self.limits.turn_tokens)
        )
    except TimeoutError:
      if not timeout.expired():  # the policy's own
        raise
      return "wall_time"
    message = completion.add_to(self.conversation)
    self.result.num_turns += 1
    self.result.num_written_tokens += completion.num_written_tokens
    self._last_tokens = (
      completion.num_prompt_tokens + completion.num_written_tokens
    )
    if completion.finish_reason == "length":
      return "max_tokens"
    if "malformed" in message:
      self._tell_error(tools.ToolError(message["malformed"]))
      return ""
    calls = chat.tool_calls(message)
    for name, arguments in calls:
      if await self._call(checker, name, arguments):
        return "done"
    return "" if calls else "answered"

  async def _call(self, checker, name, text) -> bool:
    """One tool call; returns whether the environment is done."""
    try:
      arguments = checker.arguments(name, text)
    except tools.ToolError as error:
      self._tell_error(error)
      return False
    self.result.num_calls += 1
    call = protocol.ToolCall(name=name, arguments=arguments)
    step = await self._within(lambda: self._environment.step(call), "steps")
    self._observe(step.observation)
    return step.done

  def _tell_error(self, error: tools.ToolError) -> None:
    self.result.num_bad_calls += 1
    self._observe(tools.observation_of_error(error))

  def _observe(self, text: str) -> None:
    text = tools.clip(text, tools.ToolLimits().result_chars)
    self.conversation.add({"role": "tool", "content": text})

  async def _manage(self, manage_context) -> None:
    changes = self.result.num_context_changes
    if manage_context is None or changes >= self.limits.context_changes:
      return
    changed = await manage_context(
      self.conversation,
      self.policy,
      num_tokens=self._num_tokens(),
      window=self.limits.window,
    )
    if changed:
      self.result.num_context_changes += 1
      self._last_tokens = 0

  def _num_tokens(self) -> int:
    if self.policy.tokenizer is None:
      return self._last_tokens
    return self.conversation.num_tokens

  async def _within(self, begin, what: str):
    """Awaits what an environment does, and gives up on what hangs."""
    seconds = self.limits.environment_seconds
    try:
      value = begin()
      if not inspect.isawaitable(value):
        return value
      return await abandon_after(_without_exit(value), seconds)
    except TimeoutError as error:
      text = str(error) or f"more than {seconds:g} s"
      raise _EnvironmentError(f"the environment {what}: {text}") from error
    except Exception as error:
      text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
      raise _EnvironmentError(f"the environment {what}: {text}") from error


async def abandon_after(value: Awaitable[Any], seconds: float) -> Any:
  """Awaits something for some time and no longer, even if it will not stop.

  `asyncio.timeout` waits for what it cancels; this does not.

  Raises:
    TimeoutError: the time is over; the task is cancelled and left alone.
  """
  task = asyncio.ensure_future(value)
  try:
    done, _ = await asyncio.wait({task}, timeout=seconds)
  except asyncio.CancelledError:
    task.cancel()
    raise
  if done:
    if task.cancelled():  # by itself: no reason to cancel whoever waits
      raise RuntimeError("it was cancelled from within")
    return task.result()
  task.cancel()
  task.add_done_callback(_forget)
  raise TimeoutError


async def _without_exit(value: Awaitable[Any]) -> Any:
  """What an environment does cannot end the program."""
  try:
    return await value
  except SystemExit as error:
    raise RuntimeError(f"exits with {error.code}") from error


def _forget(task: asyncio.Future) -> None:
  if not task.cancelled() and task.exception() is not None:
    _LOG.info("an abandoned task raised %r", task.exception())
