"""Replies held to a schema, against the check of another library."""

import json

import jsonschema
import numpy as np
import pytest

from dsv32_jax.generation.server import constraints
from dsv32_jax.generation.server import schemas
from tests.support import constrained

SCHEMA = {
  "type": "object",
  "properties": {
    "id": {"type": "integer", "minimum": -9, "maximum": 9},
    "kind": {"enum": ["what", "it \u00e9"]},
    "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    "note": {"type": "string", "maxLength": 5},
  },
  "required": ["id", "kind", "tags", "note"],
  "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_keeps_to_the_schema(grammars, tokenizer, seed):
  new = grammars.constraints(SCHEMA, thinking=False)
  first, second = new(), new()
  drawn = constrained.written(first, tokenizer, seed)
  jsonschema.validate(json.loads(tokenizer.decode(drawn[:-1])), SCHEMA)
  assert first.failure is None
  # Another answer has a place of its own, and nothing hangs on how often it
  # is asked.
  for count in range(0, len(drawn), 7):
    again = constrained.ids_of(second.allowed(drawn[:count]))
    assert drawn[count] in again
    np.testing.assert_array_equal(
      constrained.ids_of(second.allowed(drawn[:count])), again
    )
  # Whoever goes on behind the end may only end again.
  assert constrained.ids_of(first.allowed(drawn)).tolist() == [tokenizer.eos_id]


def test_thinking_is_free_and_does_not_end_the_answer(grammars, tokenizer):
  (constraint,) = [grammars.constraints(SCHEMA, thinking=True)()]
  free = constrained.ids_of(constraint.allowed([]))
  assert tokenizer.eos_id not in free
  assert set(range(tokenizer.vocab_size)) - set(free) == {tokenizer.eos_id}
  thought = [*tokenizer.encode("what {"), tokenizer.special_id("think_end")]
  drawn = constrained.written(constraint, tokenizer, 1, thought)
  text = tokenizer.decode(drawn[len(thought) : -1])
  jsonschema.validate(json.loads(text), SCHEMA)


def test_no_special_token_is_text(grammars, tokenizer):
  constraint = grammars.constraints({"type": "string"}, thinking=False)()
  allowed = constrained.ids_of(constraint.allowed(tokenizer.encode('"')))
  assert len(allowed) > 100
  assert not set(allowed) & set(tokenizer.special_ids)


def test_what_the_schema_forbids_ends_the_answer_as_a_failure(
  grammars, tokenizer
):
  """As where more than the constraint decides what is drawn."""
  constraint = grammars.constraints({"type": "integer"}, thinking=False)()
  allowed = constraint.allowed(tokenizer.encode("x"))
  assert constrained.ids_of(allowed).tolist() == [tokenizer.eos_id]
  assert constraint.failure


TOOL = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.mark.parametrize(
  "asked",
  [{"response_format": {"type": "json_object"}}, {"tools": [TOOL]}],
  ids=["text", "calls"],
)
def test_a_strict_reply_has_an_end(grammars, tokenizer, asked):
  request = schemas.ChatRequest.model_validate(
    {
      "model": "m",
      "messages": [{"role": "user", "content": "hi"}],
      "ignore_eos": True,
      **asked,
    }
  )
  with pytest.raises(ValueError, match="ignore_eos=true"):
    constraints.maker(request, tokenizer, grammars, thinking=False)


@pytest.mark.parametrize(
  "schema,message",
  [
    ({"type": "frob"}, "frob"),
    ({"$ref": "http://x.y/z"}, "http://x.y/z"),
    ({"not": {"type": "string"}}, "not"),
    ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"),
    # These fail at a token only.
    ({"$ref": "#"}, ""),
    ({"properties": {f"p{n}": {} for n in range(1500)}}, "items"),
    ({"const": "\ud800"}, "escape"),
  ],
)
def test_schemas_that_cannot_be_kept_to(grammars, schema, message):
  pattern = f"response_format: .*{message}"
  with pytest.raises(ValueError, match=pattern) as told:
    grammars.constraints(schema, thinking=False)
  assert "\n" not in str(told.value)
