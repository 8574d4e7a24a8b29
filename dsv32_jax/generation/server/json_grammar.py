"""Replies and calls that keep to JSON schemas, by `llguidance`, by token.

The schema is a grammar there; what the grammar allows next is a mask over the
tokens. Schemas that it cannot keep to are refused, never approximated.
"""

from collections.abc import Callable, Sequence
import functools
import json
from typing import Any

import llguidance
from llguidance import numpy as masks
import numpy as np

from dsv32_jax.agents import chat_format
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import call_grammar
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
    # Of calls the mark is a part, as text that has a token.
    content, mark = json.loads(tokenizer.content), None
    for token in content["added_tokens"]:
      if token["content"] == chat_format.DSML:
        token["special"], mark = False, token["id"]
    self._known_in_calls = llguidance.LLTokenizer(
      json.dumps(content),
      n_vocab=tokenizer.vocab_size,
      eos_token=tokenizer.eos_id,
    )
    self._forbidden_in_calls = [x for x in self._forbidden if x != mark]

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
    matcher = self._of_schema(schema, "response_format")
    return self._maker(matcher, self._known, self._forbidden, thinking)

  def calls(
    self, rules: call_grammar.CallRules, *, thinking: bool
  ) -> Callable[[], "JsonConstraint"]:
    """Returns a function that makes a constraint for each answer.

    Args:
      rules: that calls keep to.
      thinking: whether the answer begins with thinking, which is free.

    Raises:
      ValueError: a strict tool's schema is none, or has what no grammar can
        keep to.
    """
    text = call_grammar.lark(rules, _OPTIONS)
    for tool in rules.tools:
      for schema in call_grammar.json_schemas(tool) if tool.strict else ():
        self._of_schema(schema, "tools")
    matcher = self._matcher(
      llguidance.LLMatcher.grammar_from_lark,
      text,
      self._known_in_calls,
      "tools",
    )
    return self._maker(
      matcher, self._known_in_calls, self._forbidden_in_calls, thinking
    )

  def _of_schema(self, schema: Any, where: str) -> llguidance.LLMatcher:
    """Begins a JSON text.

    Raises:
      ValueError: telling the field it is from, if it cannot be kept to.
    """
    read = functools.partial(
      llguidance.LLMatcher.grammar_from_json_schema, overrides=_OPTIONS
    )
    return self._matcher(read, json.dumps(schema), self._known, where)

  def _matcher(self, read, text: str, known, where: str):
    try:
      matcher = llguidance.LLMatcher(known, read(text), log_level=0)
    except ValueError as error:
      raise ValueError(f"{where}: {_line(error)}") from error
    self._try_out(matcher, known, where)
    return matcher

  def _maker(self, matcher, known, forbidden, thinking):
    mark = self._think_end if thinking else None
    return lambda: JsonConstraint(matcher.deep_copy(), known, forbidden, mark)

  def _try_out(self, matcher, known, where: str) -> None:
    """Raises where the grammar fails at its first tokens, not while drawing."""
    tried = matcher.deep_copy()
    mask_1W = np.zeros((1, -(-known.vocab_size // 32)), np.int32)
    for text in ("", "{", '"'):
      if tried.is_error() or tried.is_stopped():
        break
      taken = known.tokenize_str(text) if text else []
      if taken and tried.validate_tokens(taken) < len(taken):
        break
      tried.consume_tokens(taken)
      masks.fill_next_token_bitmask(tried, mask_1W)
    if tried.is_error():
      raise ValueError(f"{where}: {_line(tried.get_error())}")


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
