"""What to do when a search outgrows the context window (paper section 4.4).

Each strategy steps in before a reply once more than `threshold` of the window
is used, and begins a new part of the conversation: what the model wrote before
stays in an earlier part, for training. The paper publishes neither the prompt
of the summary nor what is kept besides; system and user messages are kept
here, always.

The tool-call history consists of rounds: a reply with calls, its thinking
included, and the results. A reply that was not of the format is one, too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import dataclasses
from typing import Any

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies

_SUMMARY_REQUEST = (
  "The context is nearly full. All messages but the task will now be removed,"
  " and you will go on with the summary that you write next. State what the"
  " task still needs, what was found out so far and where, what was tried in"
  " vain, and what to do next. Call no tool."
)
_SUMMARY_HEADER = (
  "\n\n# Summary of the work so far\n\nEarlier messages were removed to make"
  " room. You wrote this about them:\n\n"
)


def _require_fraction(name: str, value: float) -> None:
  if not 0 < value <= 1:
    raise ValueError(f"{name}={value} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discard:
  """Drops the oldest rounds; `DISCARD_75` and `DISCARD_ALL` are the paper's.

  Kept: system and user messages, answers without calls, and the newest rounds
  with their thinking.

  Attributes:
    fraction: of the rounds to drop, rounded down, but at least one.
    threshold: fraction of the window above which it steps in.
  """

  fraction: float
  threshold: float = 0.8

  def __post_init__(self):
    _require_fraction("fraction", self.fraction)
    _require_fraction("threshold", self.threshold)

  async def __call__(
    self,
    conversation: conversations.Conversation,
    policy: policies.Policy,
    *,
    num_tokens: int,
    window: int,
  ) -> bool:
    """See loop.ContextManager."""
    del policy
    if num_tokens <= self.threshold * window:
      return False
    messages = conversation.messages
    rounds = find_rounds(messages)
    if not rounds:
      return False
    num_dropped = max(1, int(self.fraction * len(rounds)))
    dropped = {place for one in rounds[:num_dropped] for place in one}
    conversation.keep([x for x in range(len(messages)) if x not in dropped])
    return True


DISCARD_75 = Discard(fraction=0.75)
DISCARD_ALL = Discard(fraction=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """Has the model sum up, and starts again from the task and the summary.

  Kept: system and user messages; the last of these ends with the summary. The
  request for it is a user message, so the model sums up calls and results
  without its earlier thinking. What it wrote as a summary is a part of the
  conversation. Without a usable summary this is Discard-all.

  Attributes:
    threshold: fraction of the window above which it steps in.
    max_tokens: of the summary, its thinking included.
  """

  threshold: float = 0.8
  max_tokens: int = 8192

  def __post_init__(self):
    _require_fraction("threshold", self.threshold)
    if self.max_tokens < 1:
      raise ValueError(f"{self.max_tokens=} must be positive")

  async def __call__(
    self,
    conversation: conversations.Conversation,
    policy: policies.Policy,
    *,
    num_tokens: int,
    window: int,
  ) -> bool:
    """See loop.ContextManager."""
    if num_tokens <= self.threshold * window:
      return False
    messages = conversation.messages
    if not any(message["role"] == "assistant" for message in messages):
      return False
    summary = await self._ask(conversation, policy, window)
    kept = [
      index
      for index, message in enumerate(messages)
      if message["role"] not in ("assistant", "tool")
    ]
    last = chat.last_user_index(messages)
    task = str(messages[last].get("content")).partition(_SUMMARY_HEADER)[0]
    if summary:
      task += _SUMMARY_HEADER + summary
    conversation.keep(kept, {last: {**messages[last], "content": task}})
    return True

  async def _ask(self, conversation, policy, window) -> str:
    conversation.add({"role": "user", "content": _SUMMARY_REQUEST})
    room = self.max_tokens
    if policy.tokenizer is not None:
      room = min(room, window - conversation.num_tokens)
    if room <= 0:
      return ""
    completion = await policy.complete(conversation, max_tokens=room)
    message = completion.add_to(conversation)
    if "malformed" in message:
      return ""
    return (message.get("content") or "").strip()


def find_rounds(messages: Sequence[dict[str, Any]]) -> list[list[int]]:
  """Returns the indices of each reply that has results, and of these."""
  rounds = []
  for index, message in enumerate(messages):
    if message["role"] == "assistant":
      rounds.append([index])
    elif message["role"] == "tool" and rounds:
      rounds[-1].append(index)
  return [one for one in rounds if len(one) > 1]


async def fewest_steps(
  run: Callable[[int], Awaitable[loop.Episode]],
  count: int,
) -> loop.Episode:
  """Parallel-fewest-step: of independent episodes, the one of fewest turns.

  Kept: one episode as it is. Those that came to an end by themselves go before
  those stopped by a limit or a crash; of equals the first one counts. No
  reward is looked at.

  Args:
    run: coroutine function of the number of the episode, from 0.
    count: episodes, all at the same time.

  Raises:
    ValueError: count is not positive.
    ExceptionGroup: of what `run` raised.
  """
  if count < 1:
    raise ValueError(f"{count=} must be positive")
  async with asyncio.TaskGroup() as group:
    tasks = [group.create_task(run(number)) for number in range(count)]
  episodes = [task.result() for task in tasks]
  return min(
    episodes,
    key=lambda episode: (
      episode.result.finish not in ("answered", "done"),
      episode.result.num_turns,
    ),
  )
