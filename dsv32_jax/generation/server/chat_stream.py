"""The text of a reply as it comes, told apart: thinking, content, tool calls.

What is given out together is what `agents.chat_parse` reads in the whole text,
where that has the format. Where it has not, nothing is lost: a call that is
malformed or breaks off, and whatever follows it, is content as it stands.
"""

import dataclasses

from dsv32_jax.agents import chat_format
from dsv32_jax.agents import chat_parse
from dsv32_jax.generation.server import text_stream

_CALLS_START = chat_parse.CALLS_START
_INVOKE = f">\n{chat_parse.INVOKE_START}"
_CALLS_END = f">\n{chat_parse.CALLS_END}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """A whole tool call; arguments is the text of a JSON object."""

  name: str
  arguments: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
  """What a piece of text adds to a message."""

  reasoning: str = ""
  content: str = ""
  calls: tuple[Call, ...] = ()

  def __bool__(self) -> bool:
    return bool(self.reasoning or self.content or self.calls)

  def __add__(self, other: "Delta") -> "Delta":
    return Delta(
      reasoning=self.reasoning + other.reasoning,
      content=self.content + other.content,
      calls=self.calls + other.calls,
    )


class ChatStream:
  """Takes the text behind a prompt, without its end-of-sequence token.

  Attributes:
    num_calls: tool calls that were given out.
    is_malformed: whether what began as a call, or stood behind one, is none.
  """

  def __init__(
    self, *, thinking: bool, with_tools: bool, most_calls: int | None = None
  ):
    """Begins a reply.

    Args:
      thinking: whether the prompt ends with the opening of the thinking.
      with_tools: whether a block of tool calls is one; else it is content.
      most_calls: what follows that many is left out; None: nothing is.
    """
    self.num_calls, self.is_malformed = 0, False
    self._with_tools, self._most_calls = with_tools, most_calls
    self._read = self._reasoning if thinking else self._content
    self._text = ""  # not yet given out
    # Inside a call: how far its end was searched for, and for what.
    self._place, self._in_parameter = 0, False

  @property
  def is_full(self) -> bool:
    """Whether the reply has as many calls as it may."""
    return self.num_calls == self._most_calls

  def push(self, text: str) -> Delta:
    """Returns what is certain with this text."""
    self._text += text
    delta, read = Delta(), None
    while self._text and read != self._read:
      read = self._read
      delta += read()
    return delta

  def finish(self) -> Delta:
    """Returns what was held back; the reply is over."""
    rest, self._text = self._text, ""
    if self._read == self._reasoning:
      return Delta(reasoning=rest)
    if self._read == self._calls:
      if self.num_calls == 0:
        return Delta(content=_CALLS_START + rest)
      # All calls were whole; only the end of their block may be cut off.
      return Delta() if _CALLS_END.startswith(rest) else Delta(content=rest)
    return Delta(content=rest)

  def _take(self, count: int) -> str:
    taken, self._text = self._text[:count], self._text[count:]
    return taken

  def _up_to(self, mark: str) -> tuple[str, bool]:
    """Takes the text up to a mark, or what cannot be the mark's beginning."""
    place = self._text.find(mark)
    if place >= 0:
      before = self._take(place)
      self._take(len(mark))
      return before, True
    held = text_stream.overlap(self._text, mark)
    return self._take(len(self._text) - held), False

  def _reasoning(self) -> Delta:
    text, ended = self._up_to(chat_format.THINK_END)
    if ended:
      self._read = self._content
    return Delta(reasoning=text)

  def _content(self) -> Delta:
    if not self._with_tools:
      return self._plain()
    text, ended = self._up_to(_CALLS_START)
    if ended:
      self._read = self._calls
    return Delta(content=text)

  def _plain(self) -> Delta:
    return Delta(content=self._take(len(self._text)))

  def _calls(self) -> Delta:
    """Takes whole calls, each of which begins behind the one before."""
    found = []
    while True:
      if self._text.startswith(_CALLS_END):
        self._take(len(_CALLS_END))
        self._read = self._plain
        break
      if not self._text.startswith(_INVOKE):
        if any(mark.startswith(self._text) for mark in (_INVOKE, _CALLS_END)):
          break
        return self._give_up(found)
      end = self._call_end()
      if end is None:
        break
      call = _parse_call(self._text[:end])
      if call is None:
        return self._give_up(found)
      found.append(call)
      self.num_calls += 1
      self._take(end)
      self._place, self._in_parameter = 0, False
      if self.is_full:
        self._read = self._nothing
        break
    return Delta(calls=tuple(found))

  def _nothing(self) -> Delta:
    self._text = ""
    return Delta()

  def _give_up(self, found: list[Call]) -> Delta:
    self.is_malformed = True
    if self.num_calls == 0:
      self._text = _CALLS_START + self._text
    self._read = self._plain
    return Delta(calls=tuple(found)) + self._plain()

  def _call_end(self) -> int | None:
    """Searches where the call ends, on from where the last search stopped."""
    while True:
      if self._in_parameter:
        marks = (chat_parse.PARAMETER_END,)
      else:
        marks = (chat_parse.PARAMETER_START, chat_parse.INVOKE_END)
      found = [(self._text.find(mark, self._place), mark) for mark in marks]
      found = [(place, mark) for place, mark in found if place >= 0]
      if not found:
        longest = max(len(mark) for mark in marks)
        self._place = max(self._place, len(self._text) - longest + 1)
        return None
      place, mark = min(found)
      self._place = place + len(mark)
      if mark == chat_parse.INVOKE_END:
        return self._place
      self._in_parameter = not self._in_parameter


def _parse_call(text: str) -> Call | None:
  """Reads one call; None where the format, or a later prompt, refuses it."""
  try:
    message = chat_parse.parse(_CALLS_START + text + _CALLS_END, thinking=False)
    function = message["tool_calls"][0]["function"]
    # What comes back in a later prompt has to have a rendering.
    chat_format.calls_block([(function["name"], function["arguments"])])
  except ValueError:
    return None
  return Call(**function)
