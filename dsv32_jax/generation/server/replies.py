"""From the events of the engine to the choices of a reply.

A streamed reply and a whole one are made of the same deltas. Log-probabilities
are those of the drawn tokens in the distribution they were drawn from, after
temperature and truncation, for all that the model wrote, thinking included.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple
import uuid

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import chat_stream
from dsv32_jax.generation.server import text_stream


class Token(NamedTuple):
  """A token, its log-probability, and the same of the likeliest ones."""

  token_id: int
  logprob: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What one event adds to a choice.

  Attributes:
    delta: text and calls that are certain now.
    tokens: drawn since the last step given out.
    finish_reason: on the last one.
  """

  delta: chat_stream.Delta
  tokens: tuple[Token, ...] = ()
  finish_reason: str | None = None


class Choice:
  """One answer on its way.

  Attributes:
    num_tokens: drawn so far.
    finish_reason: None as long as it goes on.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    stop: Sequence[str],
    chat: chat_stream.ChatStream | None,
  ):
    """Begins an answer; without a ChatStream all text is content."""
    self.num_tokens = 0
    self.finish_reason: str | None = None
    self._eos_id = tokenizer.eos_id
    self._text = text_stream.TextStream(
      functools.partial(text_stream.decode, tokenizer), stop
    )
    self._chat = chat
    self._tokens: list[Token] = []

  @property
  def is_malformed(self) -> bool:
    """Whether it began tool calls that are none."""
    return self._chat is not None and self._chat.is_malformed

  def push(self, event: requests.TokenEvent) -> Step | None:
    """Takes an event; None where nothing is certain yet."""
    if self.finish_reason is not None:
      return None
    text, reason = "", event.finish_reason
    if event.token_id is not None:
      self.num_tokens += 1
      # JSON has no infinities, and the API this number in their place.
      logprob = event.logprob if math.isfinite(event.logprob) else -9999.0
      self._tokens.append(Token(event.token_id, logprob, event.top_logprobs))
      if not (reason == "stop" and event.token_id == self._eos_id):
        text = self._text.push(event.token_id)
    if reason is None and self._text.stopped:
      reason = "stop"
    if reason is not None:
      text += self._text.finish()
    delta = self._delta(text, ended=reason is not None)
    if reason is None and self._chat is not None and self._chat.is_full:
      reason = "stop"
    if reason == "stop" and self._chat is not None and self._chat.num_calls:
      reason = "tool_calls"
    self.finish_reason = reason
    if not delta and reason is None:
      return None
    tokens, self._tokens = tuple(self._tokens), []
    return Step(delta=delta, tokens=tokens, finish_reason=reason)

  def _delta(self, text: str, *, ended: bool) -> chat_stream.Delta:
    if self._chat is None:
      return chat_stream.Delta(content=text)
    delta = self._chat.push(text)
    return delta + self._chat.finish() if ended else delta


def usage(num_prompt: int, num_drawn: int) -> dict[str, int]:
  """Returns the token counts of a reply."""
  return {
    "prompt_tokens": num_prompt,
    "completion_tokens": num_drawn,
    "total_tokens": num_prompt + num_drawn,
  }


class ChatFormat:
  """Objects of /v1/chat/completions."""

  prefix = "chatcmpl-"
  kinds = ("chat.completion", "chat.completion.chunk")

  def __init__(self, tokenizer: tokenizers.Tokenizer, with_logprobs: bool):
    self._tokenizer, self._with_logprobs = tokenizer, with_logprobs
    self._num_calls: dict[int, int] = {}

  def opening(self, index: int) -> dict[str, Any]:
    """The first chunk of a choice, before anything is drawn."""
    return {
      "index": index,
      "delta": {"role": "assistant", "content": ""},
      "logprobs": None,
      "finish_reason": None,
    }

  def chunks(self, index: int, step: Step) -> Iterator[dict[str, Any]]:
    """Yields what a step is in a stream: an end is a chunk of its own."""
    delta: dict[str, Any] = {}
    if step.delta.reasoning:
      delta["reasoning_content"] = step.delta.reasoning
    if step.delta.content:
      delta["content"] = step.delta.content
    if step.delta.calls:
      first = self._num_calls.get(index, 0)
      self._num_calls[index] = first + len(step.delta.calls)
      delta["tool_calls"] = [
        {"index": first + place, **_call(call)}
        for place, call in enumerate(step.delta.calls)
      ]
    logprobs = self._logprobs(step.tokens)
    if delta or logprobs:
      yield {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": None,
      }
    if step.finish_reason is not None:
      yield {
        "index": index,
        "delta": {},
        "logprobs": None,
        "finish_reason": step.finish_reason,
      }

  def whole(self, index: int, steps: Sequence[Step]) -> dict[str, Any]:
    """A finished choice."""
    delta = sum((step.delta for step in steps), start=chat_stream.Delta())
    message: dict[str, Any] = {"role": "assistant", "content": delta.content}
    if delta.reasoning:
      message["reasoning_content"] = delta.reasoning
    if delta.calls:
      message["tool_calls"] = [_call(call) for call in delta.calls]
    return {
      "index": index,
      "message": message,
      "logprobs": self._logprobs([x for step in steps for x in step.tokens]),
      "finish_reason": steps[-1].finish_reason,
    }

  def _logprobs(self, tokens) -> dict[str, Any] | None:
    if not self._with_logprobs or not tokens:
      return None
    return {
      "content": [
        {
          **self._told(token.token_id, token.logprob),
          "top_logprobs": [self._told(*one) for one in token.top],
        }
        for token in tokens
      ]
    }

  def _told(self, token_id: int, logprob: float) -> dict[str, Any]:
    text = text_stream.decode(self._tokenizer, [token_id])
    broken = text_stream.BROKEN in text
    return {
      "token": text,
      "logprob": logprob,
      # The bytes of a part of a character are not known here.
      "bytes": None if broken else list(text.encode()),
    }


class CompletionFormat:
  """Objects of /v1/completions."""

  prefix = "cmpl-"
  kinds = ("text_completion", "text_completion")

  def __init__(self, tokenizer: tokenizers.Tokenizer, with_logprobs: bool):
    self._tokenizer, self._with_logprobs = tokenizer, with_logprobs

  def opening(self, index: int) -> None:
    """A stream of text begins with its text."""

  def chunks(self, index: int, step: Step) -> Iterator[dict[str, Any]]:
    """Yields what a step is in a stream."""
    yield self.whole(index, [step])

  def whole(self, index: int, steps: Sequence[Step]) -> dict[str, Any]:
    """A finished choice."""
    return {
      "index": index,
      "text": "".join(step.delta.content for step in steps),
      "logprobs": self._logprobs([x for step in steps for x in step.tokens]),
      "finish_reason": steps[-1].finish_reason,
    }

  def _logprobs(self, tokens) -> dict[str, Any] | None:
    if not self._with_logprobs:
      return None
    with_top = any(token.top for token in tokens)
    return {
      "tokens": [self._text(token.token_id) for token in tokens],
      "token_logprobs": [token.logprob for token in tokens],
      "top_logprobs": [
        {self._text(token_id): logprob for token_id, logprob in token.top}
        for token in tokens
      ]
      if with_top
      else None,
      "text_offset": None,
    }

  def _text(self, token_id: int) -> str:
    return text_stream.decode(self._tokenizer, [token_id])


def _call(call: chat_stream.Call) -> dict[str, Any]:
  return {
    "id": f"call_{uuid.uuid4().hex}",
    "type": "function",
    "function": {"name": call.name, "arguments": call.arguments},
  }
