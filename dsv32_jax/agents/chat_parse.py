"""From the text of a completion to its message, as strictly as the format is.

The time is linear in the text, whatever it holds: each string that may end a
part is searched for once over, and no pattern backtracks.
"""

import re
from typing import Any

from dsv32_jax.agents import chat_format

CALLS_START = f"\n\n<{chat_format.DSML}function_calls"
CALLS_END = f"</{chat_format.DSML}function_calls>"
INVOKE_START = f"<{chat_format.DSML}invoke"
INVOKE_END = f"</{chat_format.DSML}invoke"
PARAMETER_START = f"<{chat_format.DSML}parameter"
PARAMETER_END = f"/{chat_format.DSML}parameter"
_KEY_OPEN = ' name="'
_KIND = re.compile(r'" string="(true|false)">')
# What thinking and content cannot hold.
_FORBIDDEN = (
  chat_format.BOS,
  chat_format.EOS,
  chat_format.THINK_START,
  chat_format.THINK_END,
  chat_format.DSML,
)


def parse(text: str, *, thinking: bool) -> dict[str, Any]:
  """See `chat.parse_message_from_completion_text`."""
  reader = _Reader(text)
  reasoning = ""
  if thinking:
    reasoning, stop = reader.read(chat_format.THINK_END, CALLS_START)
    _require(stop == chat_format.THINK_END, "the thinking does not end")
  content, stop = reader.read(chat_format.EOS, CALLS_START)
  _require(stop is not None, "neither eos nor tool calls follow the content")
  calls = []
  if stop == CALLS_START:
    calls = _read_calls(reader)
    behind, _ = reader.read(chat_format.EOS)
    _require(not behind, "something follows the tool calls")
  _require(reader.at_end, "something follows the end")
  for token in _FORBIDDEN:
    _require(token not in content, f"the content holds {token!s}")
    _require(token not in reasoning, f"the thinking holds {token!s}")
  return {
    "role": "assistant",
    "content": content,
    "reasoning_content": reasoning,
    "tool_calls": [
      {"type": "function", "function": {"name": name, "arguments": arguments}}
      for name, arguments in calls
    ],
  }


class _Reader:
  """Reads a text part by part, each up to the nearest of some strings."""

  def __init__(self, text: str):
    self._text, self._place = text, 0
    # Where each string comes next; kept, for else a string that is not there
    # would be searched for in the whole rest time and again.
    self._next: dict[str, int] = {}

  @property
  def at_end(self) -> bool:
    return self._place == len(self._text)

  def read(self, *stops: str) -> tuple[str, str | None]:
    """Returns the text up to the nearest stop and that stop, or all, None."""
    nearest, found = len(self._text), None
    for stop in stops:
      place = self._next.get(stop, -1)
      if place < self._place:
        place = self._text.find(stop, self._place)
        place = len(self._text) if place < 0 else place
        self._next[stop] = place
      if place < nearest:
        nearest, found = place, stop
    part = self._text[self._place : nearest]
    self._place = nearest + len(found or "")
    return part, found


def _read_calls(reader: _Reader) -> list[tuple[str, str]]:
  calls = []
  while not reader.at_end:
    between, stop = reader.read(INVOKE_START, CALLS_END)
    _require(between == ">\n", "a line of the tool calls is out of place")
    if stop == CALLS_END:
      break
    _require(stop is not None, "the tool calls do not end")
    head, stop = reader.read(PARAMETER_START, INVOKE_END)
    name = _function_name(head)
    parameters = {}
    while stop == PARAMETER_START:
      parameter, _ = reader.read(PARAMETER_END)
      key, value = _parameter(parameter)
      _require(key not in parameters, "a parameter is given twice")
      parameters[key] = value
      between, stop = reader.read(PARAMETER_START, INVOKE_END)
      _require(between == ">\n", "a parameter does not end its line")
    pairs = (f"{chat_format.to_json(k)}: {v}" for k, v in parameters.items())
    calls.append((name, "{" + ", ".join(pairs) + "}"))
  return calls


def _function_name(head: str) -> str:
  """Reads ` name="f">`, a line end and perhaps an empty line."""
  rest = head.lstrip()
  opened = rest.startswith('name="')
  rest = rest.removeprefix('name="')
  # An empty line stands where a call has no parameter.
  name = rest.removesuffix("\n") if rest.endswith('">\n\n') else rest
  _require(opened and name.endswith('">\n'), "a tool's name is malformed")
  return name[: -len('">\n')]


def _parameter(text: str) -> tuple[str, str]:
  """Reads ` name="k" string="true">v<`; the value as JSON text."""
  kind = _KIND.search(text, len(_KEY_OPEN))
  end = text.removesuffix("\n")
  well_formed = kind and text.startswith(_KEY_OPEN) and end.endswith("<")
  _require(bool(well_formed), "a parameter is malformed")
  value = end[kind.end() : -1]
  if kind.group(1) == "true":
    value = chat_format.to_json(value)
  return text[len(_KEY_OPEN) : kind.start()], value


def _require(condition: bool, what: str) -> None:
  if not condition:
    raise ValueError(f"completion: {what}")
