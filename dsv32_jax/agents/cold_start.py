"""Cold start: prompts that join reasoning and tool use, sampled and filtered.

Paper section 3.2.2 and its tables 6 to 8: the model reasons without tools and
uses tools without reasoning; a system prompt for each, and a third that asks
for tools inside the thinking, bring out trajectories that do both. What a
verifier accepts becomes supervised data, a seed for reinforcement learning. The
prompts here are in our own words; tools are described by the chat format.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents import tables

_REASONING = (
  "You solve problems that are checked by a program. Think the problem through"
  " from all sides before you commit yourself, and write that thinking between"
  " {start} and {end}. Behind {end} give the final answer, complete and in the"
  " form that the problem asks for."
)
_TOOL_USE = (
  "You work on tasks with tools. Call them to learn what you need and to check"
  " what you assume; the user sees neither the calls nor their results, so do"
  " not make anything with them that is meant to be seen, such as plots or"
  " files. State is kept from call to call. A call gives its result, or an"
  " error after {seconds:g} seconds. When you know the answer, give it in full."
)
_REASONING_WITH_TOOLS = (
  "You work on tasks with tools, and you call them while you think, between"
  " {start} and {end}: think a little, call a tool early, read the result, and"
  " think on from there. Prefer a call to a long argument. You have at most"
  " {calls} calls. As soon as you have found the answer, stop, and present it"
  " behind {end} with Markdown, and LaTeX for formulas; call no tool there, but"
  " for one that submits the answer."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
  """A kind of trajectory.

  Attributes:
    name: of the mode.
    template: of the system prompt.
    thinking_mode: "thinking" or "chat".
    tools: whether it must call them; else it must not.
    max_calls: of a trajectory that is kept.
  """

  name: str
  template: str
  thinking_mode: str
  tools: bool
  max_calls: int = 0

  def system_prompt(self, *, seconds: float = 120.0) -> str:
    """Returns the system prompt; `seconds` is what a call may take."""
    return self.template.format(
      start=chat_format.THINK_START,
      end=chat_format.THINK_END,
      calls=self.max_calls,
      seconds=seconds,
    )


REASONING = Mode(
  name="reasoning",
  template=_REASONING,
  thinking_mode="thinking",
  tools=False,
)
TOOL_USE = Mode(
  name="tool_use",
  template=_TOOL_USE,
  thinking_mode="chat",
  tools=True,
  max_calls=200,
)
REASONING_WITH_TOOLS = Mode(
  name="reasoning_with_tools",
  template=_REASONING_WITH_TOOLS,
  thinking_mode="thinking",
  tools=True,
  max_calls=20,
)
MODES = {
  mode.name: mode for mode in (REASONING, TOOL_USE, REASONING_WITH_TOOLS)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
  """What to sample, and from whom.

  Attributes:
    seed: of tasks and scripted policies.
    modes: names of MODES.
    num_tasks: of each mode.
    attempts: trajectories of a task.
    least_reward: that an example has.
    most_of_a_task: examples of one task and mode.
    concurrency: trajectories at a time.
    search_tasks: folder of a synthesis of search tasks.
    base_url, model: of an OpenAI-compatible endpoint; "" for scripts.
  """

  seed: int = 0
  modes: tuple[str, ...] = tuple(MODES)
  num_tasks: int = 40
  attempts: int = 4
  least_reward: float = 1.0
  most_of_a_task: int = 1
  concurrency: int = 8
  search_tasks: str = ""
  base_url: str = ""
  model: str = ""

  def __post_init__(self):
    for name in ("num_tasks", "attempts", "most_of_a_task", "concurrency"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    unknown = set(self.modes) - set(MODES)
    if unknown or not self.modes:
      raise ValueError(f"modes={self.modes} must be of {', '.join(MODES)}")
    if not self.search_tasks and any(MODES[x].tools for x in self.modes):
      raise ValueError("search_tasks is empty, and a mode has tools")
    if bool(self.base_url) != bool(self.model):
      raise ValueError(
        f"base_url={self.base_url!r} and model={self.model!r} go together"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
  """An episode with the mode and the task that it was sampled for."""

  mode: str
  task: str
  result: loop.EpisodeResult

  def row(self) -> dict[str, Any]:
    """Returns it as JSON-able values."""
    return {**self.result.row(), "mode": self.mode, "task": self.task}


async def sample_reasoning(
  policy: policies.Policy,
  question: str,
  score: Callable[[str], float],
  *,
  episode_id: str,
  max_tokens: int = 32_768,
) -> loop.EpisodeResult:
  """Samples one answer without tools.

  Args:
    policy: what answers.
    question: of the user.
    score: reward of the answer's text, its thinking left out.
    episode_id: of the result.
    max_tokens: of the reply.
  """
  conversation = conversations.Conversation(
    policy.tokenizer, REASONING.thinking_mode
  )
  system = {"role": "system", "content": REASONING.system_prompt()}
  conversation.add(system)
  conversation.add({"role": "user", "content": question})
  completion = await policy.complete(conversation, max_tokens=max_tokens)
  message = completion.add_to(conversation)
  ended = completion.finish_reason == "stop" and "malformed" not in message
  return loop.EpisodeResult(
    id=episode_id,
    reward=score(message.get("content") or "") if ended else 0.0,
    finish="answered" if ended else "max_tokens",
    num_turns=1,
    num_bad_calls=int("malformed" in message),
    num_written_tokens=completion.num_written_tokens,
    messages=conversation.messages,
  )


async def sample_with_tools(
  policy: policies.Policy,
  mode: Mode,
  make_environment: loop.MakeEnvironment,
  *,
  episode_id: str,
  limits: loop.EpisodeLimits = loop.EpisodeLimits(),
) -> loop.EpisodeResult:
  """Samples one episode under a mode's system prompt; see `run_episode`.

  Raises:
    ValueError: the mode has no tools.
  """
  if not mode.tools:
    raise ValueError(f"mode {mode.name!r} has no tools")
  episode = await loop.run_episode(
    policy,
    make_environment,
    episode_id=episode_id,
    limits=limits,
    thinking_mode=mode.thinking_mode,
    system_prompt=mode.system_prompt(seconds=limits.environment_seconds),
  )
  return episode.result


def reason_against(
  row: Mapping[str, Any], mode: Mode, least_reward: float
) -> str:
  """Tells why a trajectory is no example of its mode, "" if it is one.

  Args:
    row: of an `EpisodeResult`.
    mode: that it was sampled in.
    least_reward: that an example has.
  """
  if row["finish"] not in ("answered", "done"):
    return f"it ended by {row['finish']}"
  if row["reward"] < least_reward:
    return "its reward is too low"
  if row["num_bad_calls"]:
    return "it has calls or replies that are wrong"
  if row["num_context_changes"]:
    return "its context was cut"
  written = [x for x in row["messages"] if x["role"] == "assistant"]
  calls = sum(len(chat.tool_calls(message)) for message in written)
  thoughts = [bool(message.get("reasoning_content")) for message in written]
  if calls > mode.max_calls:
    return f"it makes more than {mode.max_calls} calls"
  if mode.tools and not calls:
    return "it calls no tool"
  if mode.thinking_mode == "chat" and any(thoughts):
    return "it thinks"
  if mode.thinking_mode == "thinking" and not thoughts[0]:
    return "it does not think first"
  return ""


def pieces(
  messages: Sequence[chat.Message], thinking_mode: str
) -> list[dict[str, Any]]:
  """Renders a trajectory as `data.pieces` reads it: what is learnt, what not.

  Learnt is what the assistant wrote behind the last user message, eos included.

  Args:
    messages: of a conversation that ends with the assistant, or with the
      result of a call that ended the episode, which is left out.
    thinking_mode: "thinking" or "chat".

  Raises:
    ValueError: the messages have no rendering, or nothing is learnt.
  """
  last = max(
    (n for n, x in enumerate(messages) if x["role"] == "assistant"), default=-1
  )
  last_user = chat.last_user_index(messages)
  messages = messages[: last + 1]
  if last <= last_user:
    raise ValueError("no assistant message follows the last user message")
  # Together, since earlier turns look otherwise once another one follows.
  counts = [
    len(chat.render(messages[: last_user + 1], thinking_mode)),
    *(
      len(
        chat.render([messages[place]], thinking_mode, context=messages[:place])
      )
      for place in range(last_user + 1, last + 1)
    ),
  ]
  learnt = [
    False,
    *(x["role"] == "assistant" for x in messages[last_user + 1 :]),
  ]
  marks = [mark for count, mark in zip(counts, learnt) for _ in range(count)]
  return [
    _piece(text, mark)
    for text, mark in zip(
      chat.render(messages, thinking_mode), marks, strict=True
    )
    if text
  ]


def _piece(text: str, learnt: bool) -> dict[str, Any]:
  mark = {"learnt": True} if learnt else {}
  if isinstance(text, chat_format.SpecialToken):
    return {"special": text.name, **mark}
  return {"text": str(text), **mark}


def sft_rows(
  rows: Sequence[Mapping[str, Any]],
  *,
  least_reward: float = 1.0,
  most_of_a_task: int = 1,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Filters trajectories into supervised data.

  Args:
    rows: of episodes, with `mode` and `task` besides.
    least_reward: that an example has.
    most_of_a_task: examples of one task and mode, those of fewest turns.

  Returns:
    Rows `id`, `mode`, `reward`, `messages` and `pieces` (both JSON text), and
    of what was left out `id`, `mode`, `reward` and `reason`.
  """
  kept, left_out, counts = [], [], {}
  order = sorted(range(len(rows)), key=lambda n: (rows[n]["num_turns"], n))
  for row in (rows[number] for number in order):
    mode = MODES[row["mode"]]
    reason = reason_against(row, mode, least_reward)
    key = row["mode"], row["task"]
    if not reason and counts.get(key, 0) >= most_of_a_task:
      reason = "there are enough of its task"
    shown = {name: row[name] for name in ("id", "mode", "reward")}
    if reason:
      left_out.append({**shown, "reason": reason})
      continue
    counts[key] = counts.get(key, 0) + 1
    parts = pieces(row["messages"], mode.thinking_mode)
    kept.append(
      {
        **shown,
        "messages": json.dumps(row["messages"]),
        "pieces": json.dumps(parts),
      }
    )
  by_id = lambda row: row["id"]
  return sorted(kept, key=by_id), sorted(left_out, key=by_id)


def write(
  folder: pathlib.Path,
  kept: Sequence[Mapping[str, Any]],
  left_out: Sequence[Mapping[str, Any]],
) -> None:
  """Writes sft.jsonl and rejections.jsonl.

  Fine-tuning reads the first with a source of kind "jsonl" and pieces_field
  "pieces".
  """
  tables.write_jsonl(folder / "sft.jsonl", kept)
  tables.write_jsonl(folder / "rejections.jsonl", left_out)
