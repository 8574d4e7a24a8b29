"""Conversations as pieces: text, special tokens, and which of it is learnt.

A record's field holds a JSON list of objects: {"text": ...} or {"special": a
name of `tokenizer.SPECIAL_TOKENS`}, each with "learnt": true where the model is
to learn it. So any layout with any number of turns, thinking and tool calls
can be trained on, and whatever text spells stays text. The agents' part writes
such records (`agents.cold_start`).
"""

from collections.abc import Iterator
import json

from dsv32_jax.data import tokenizer as tokenizers

Part = tuple[str | int, bool]


def read(content: str, tokenizer: tokenizers.Tokenizer) -> Iterator[Part]:
  """Yields text or ids, each with whether it is learnt.

  Neighbouring texts come joined where both are learnt or neither is: where
  they meet is not a border of tokens. A tokenizer without the mark of tool
  calls has it spelled out, as in sampling.

  Raises:
    ValueError: the content is no list of pieces, or names a token that is not
      there.
  """
  text, learnt = "", False
  for piece in _pieces(content):
    part, learn = _part(piece, tokenizer)
    if isinstance(part, str) and learn == learnt:
      text += part
      continue
    if text:
      yield text, learnt
    text, learnt = "", learn
    if isinstance(part, str):
      text = part
    else:
      yield part, learn
  if text:
    yield text, learnt


def _pieces(content: str) -> list[dict]:
  try:
    pieces = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"pieces are no JSON: {error}") from error
  if not isinstance(pieces, list) or not pieces:
    raise ValueError("pieces are no list, or an empty one")
  return pieces


def _part(piece: dict, tokenizer: tokenizers.Tokenizer) -> Part:
  known = {"text", "special", "learnt"}
  if not isinstance(piece, dict) or not piece.keys() <= known:
    raise ValueError(f"a piece has more than {sorted(known)}")
  learnt = piece.get("learnt", False)
  named = [name for name in ("text", "special") if name in piece]
  if len(named) != 1 or not isinstance(piece[named[0]], str):
    raise ValueError("a piece has either a text or a special token")
  if not isinstance(learnt, bool):
    raise ValueError(f"{learnt=} of a piece is no truth value")
  value = piece[named[0]]
  if named == ["text"]:
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(f"a piece holds no Unicode: {error.reason}") from error
    return value, learnt
  try:
    return tokenizer.special_id(value), learnt
  except ValueError:
    if value == "dsml":
      return tokenizers.SPECIAL_TOKENS["dsml"], learnt
    raise
