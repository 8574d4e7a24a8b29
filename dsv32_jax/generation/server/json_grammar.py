"""Replies that keep to a JSON schema, token by token, by `llguidance`.

The schema is a grammar there; what the grammar allows next is a mask over the
tokens. Schemas that it cannot keep to are refused, never approximated.
"""

from collections.abc import Callable, Sequence
import json
from typing import Any

import llguidance
from llguidance import numpy as masks
import numpy as np

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import forced_calls

# W words of 32 tokens

_SHOWN_CHARS = 200
# Without a bound a reply may be white space for ever.
_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{0,64}"}


class JsonGrammars:
  """Makes constraints for one tokenizer."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._known = llguidance.LLTokenizer(
      tokenizer.content,
      n_vocab=tokenizer.vocab_size,
      eos_token=tokenizer.eos_id,
    )
    self._think_end = tokenizer.special_id("think_end")
    # Published files mark some of these as text.
    self._forbidden = [
      one for one in tokenizer.special_ids if one != tokenizer.eos_id
    ]

  def constraints(
    self, schema: Any, *, thinking: bool
  ) -> Callable[[], "JsonConstraint"]:
    """Returns a function that makes a constraint for each answer.

    Args:
      schema: of the JSON text that is the reply.
      thinking: whether the answer begins with thinking, which is free.

    Raises:
      ValueError: the schema is none, or has what no grammar can keep to.
    """
    try:
      grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides=_OPTIONS
      )
    except ValueError as error:
      raise ValueError(f"response_format: {_line(error)}") from error
    matcher = llguidance.LLMatcher(self._known, grammar, log_level=0)
    self._try_out(matcher)
    mark = self._think_end if thinking else None
    return lambda: JsonConstraint(
      matcher.deep_copy(), self._known, self._forbidden, mark
    )

  def _try_out(self, matcher) -> None:
    """Raises where the grammar fails at its first tokens, not while drawing."""
    tried = matcher.deep_copy()
    mask_1W = np.zeros((1, -(-self._known.vocab_size // 32)), np.int32)
    for text in ("", "{", '"'):
      if tried.is_error() or tried.is_stopped():
        break
      taken = self._known.tokenize_str(text) if text else []
      if taken and tried.validate_tokens(taken) < len(taken):
        break
      tried.consume_tokens(taken)
      masks.fill_next_token_bitmask(tried, mask_1W)
    if tried.is_error():
      raise ValueError(f"response_format: {_line(tried.get_error())}")


def _line(told: Any) -> str:
  """A message of the library as a line, without the state it dumps."""
  text = " ".join(str(told).split()).partition("<state>")[0].strip()
  return text[:_SHOWN_CHARS] or "the grammar failed"


class JsonConstraint:
  """A `requests.Constraint` of one answer."""

  def __init__(
    self,
    matcher: llguidance.LLMatcher,
    tokenizer: llguidance.LLTokenizer,
    forbidden: Sequence[int],
    think_end: int | None,
  ):
    """Begins an answer.

    Args:
      matcher: at its beginning, for this answer alone.
      tokenizer: of the matcher.
      forbidden: tokens that are never text.
      think_end: token behind which the JSON text begins; None: at once.
    """
    self.failure: str | None = None
    self._matcher, self._think_end = matcher, think_end
    self._eos_id, self._forbidden = tokenizer.eos_token, forbidden
    self._words = -(-tokenizer.vocab_size // 32)
    self._taken = 0

  def allowed(self, drawn: Sequence[int]) -> np.ndarray:
    """See `requests.Constraint`."""
    text = forced_calls.behind_thinking(drawn, self._think_end)
    if text is None:
      return forced_calls.all_but(self._eos_id, self._words)
    fresh, self._taken = text[self._taken :], len(text)
    if not self._matcher.is_stopped():
      self._matcher.consume_tokens(list(fresh))
    mask_1W = np.zeros((1, self._words), np.int32)
    if not self._matcher.is_stopped():
      masks.fill_next_token_bitmask(self._matcher, mask_1W)
    allowed_W = mask_1W[0].view(np.uint32)
    for one in self._forbidden:
      allowed_W[one // 32] &= ~np.uint32(1 << (one % 32))
    if self._matcher.is_error():
      self.failure = _line(self._matcher.get_error())
    if not np.any(allowed_W):
      # It is at its end, or has failed: so is the answer.
      allowed_W[self._eos_id // 32] = np.uint32(1 << (self._eos_id % 32))
    return allowed_W
