"""Answers shown while they are drawn."""

from collections.abc import Callable
import dataclasses
import re
import time
from typing import TextIO

from dsv32_jax.generation import engine as engines
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import chat_stream
from dsv32_jax.generation.server import replies
from dsv32_jax.generation.server import text_stream

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# All that moves a terminal, but for line ends and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Printer:
  """Writes answers; thinking is dimmed, or apart where that is no use.

  What a model writes cannot control a terminal: its control characters are
  replaced there. A file gets the text as it is.
  """

  def __init__(self, output: TextIO, notes: TextIO):
    """Takes two texts: for answers, and for all that is not the answer."""
    self._output, self._notes = output, notes
    self._thoughts = output if output.isatty() else notes
    self._is_thinking = False

  def show(self, delta: chat_stream.Delta) -> None:
    """Writes what is new of an answer."""
    if delta.reasoning:
      if not self._is_thinking and self._thoughts.isatty():
        self._thoughts.write(_DIM)
      self._is_thinking = True
      self._write(self._thoughts, delta.reasoning)
    if delta.content:
      self._end_thinking()
      self._write(self._output, delta.content)

  def end(self) -> None:
    """Ends the line of an answer."""
    self._end_thinking()
    self._write(self._output, "\n")

  def note(self, text: str) -> None:
    """Writes a line that is not part of the answer."""
    if self._notes.isatty():
      text = f"{_DIM}{text}{_PLAIN}"
    self._notes.write(text + "\n")
    self._notes.flush()

  def _end_thinking(self) -> None:
    if self._is_thinking:
      self._is_thinking = False
      self._thoughts.write(_PLAIN if self._thoughts.isatty() else "")
      self._write(self._thoughts, "\n\n")

  def _write(self, file: TextIO, text: str) -> None:
    if file.isatty():
      text = _CONTROL.sub(text_stream.BROKEN, text)
    file.write(text)
    file.flush()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What was drawn, and how long it took.

  Attributes:
    token_ids: all tokens, eos included.
    logprobs: of each.
    num_prompt_tokens: that it continues.
    finish_reason: "cancelled" where it was stopped.
    first_seconds: until the first token.
    seconds: of all.
  """

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  num_prompt_tokens: int
  finish_reason: str
  first_seconds: float
  seconds: float

  def figures(self) -> str:
    """One line: tokens, seconds, and the rate behind the first token."""
    count, left = len(self.token_ids), self.seconds - self.first_seconds
    rate = f", {(count - 1) / left:.1f} tokens/s" if count > 1 else ""
    return (
      f"[{self.num_prompt_tokens} prompt tokens, first token after"
      f" {self.first_seconds:.2f} s; {count} tokens in {self.seconds:.2f} s"
      f"{rate}]"
    )


def answer(
  engine: engines.Engine,
  request: requests.Request,
  choice: replies.Choice,
  printer: Printer,
  is_stopped: Callable[[], bool],
) -> Answer:
  """Runs one request alone and shows it.

  Args:
    engine: without other requests.
    request: what to continue.
    choice: reads its text.
    printer: writes it.
    is_stopped: asked after each step; the answer then ends as it is.

  Raises:
    ValueError: the engine takes the request not.
  """
  begun = time.monotonic()
  request_id = engine.submit(request)
  first, drawn, cancelled = 0.0, [], False
  while engine.has_work:
    for event in engine.step():
      step = choice.push(event)
      if step is not None:
        printer.show(step.delta)
      if event.token_id is not None:
        first = first or time.monotonic() - begun
        drawn.append(event)
    if engine.has_work and not cancelled and is_stopped():
      engine.cancel(request_id)
      cancelled = True
  printer.end()
  return Answer(
    token_ids=tuple(event.token_id for event in drawn),
    logprobs=tuple(event.logprob for event in drawn),
    num_prompt_tokens=len(request.prompt_ids),
    finish_reason=choice.finish_reason,
    first_seconds=first,
    seconds=time.monotonic() - begun,
  )
