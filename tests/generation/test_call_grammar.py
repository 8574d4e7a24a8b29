"""Calls held to strict tools, against the parser and another schema check."""

import json

import jsonschema
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.generation.server import call_grammar
from dsv32_jax.generation.server import schema_parts
from tests.support import constrained

EOS = str(chat_format.EOS)
FREE = {"type": "object", "properties": {"x": {"type": "integer"}}}


def parameters(properties, **changes):
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
    **changes,
  }


# Whatever is drawn of these ends soon.
BOUNDED = parameters(
  {
    "count": {"type": "integer", "minimum": -9, "maximum": 9},
    "kind": {"enum": ["it's <b>", 'a "b"\n', "\u00e9\u4e16", ""]},
    "odd": {"enum": ["a\u0001\u2028", "</"]},
    "mixed": {"enum": ["a", 1, None], "description": "notes change nothing"},
    "name": {"type": "string", "maxLength": 3},
    "flag": {"type": ["boolean", "null"]},
    "item": {"$ref": "#/$defs/item"},
    "maybe": {"anyOf": [{"$ref": "#/$defs/word"}, {"type": "null"}]},
    "one": {"const": "only", "type": "string"},
  },
  **{
    "$defs": {
      "word": {"type": "string", "enum": ["yes", "no"]},
      "item": parameters({"on": {"type": "boolean"}}),
    }
  },
)


def function(schema, name="f", strict=True):
  return schema_parts.ToolFunction(name=name, parameters=schema, strict=strict)


def constraint_of(grammars, *functions, forced=False, most=None):
  rules = call_grammar.CallRules(functions, forced, most)
  return grammars.calls(rules, thinking=False)()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_keeps_to_the_schema(grammars, tokenizer, seed):
  constraint = constraint_of(grammars, function(BOUNDED), forced=True, most=1)
  drawn = constrained.written(constraint, tokenizer, seed)
  assert constraint.failure is None
  text = tokenizer.decode(drawn[:-1]) + EOS
  message = chat.parse_message_from_completion_text(text, "chat")
  (call,) = message["tool_calls"]
  assert (message["content"], call["function"]["name"]) == ("", "f")
  jsonschema.validate(json.loads(call["function"]["arguments"]), BOUNDED)


def reply(*calls, content=""):
  """The text of a reply, by the format's own rendering."""
  pieces = chat_format.calls_block(
    [(name, json.dumps(arguments)) for name, arguments in calls]
  )
  return content + "".join(pieces)


def keeps(constraint, tokenizer, text):
  """Whether a text, and then the end, can be drawn: the longest tokens first.

  The tokens need not be those of the tokenizer: what is certain is drawn in
  those of the grammar's library.
  """
  left, drawn = text, []
  pieces = {x: tokenizer.decode([x]) for x in range(tokenizer.vocab_size)}
  while left:
    fitting = [
      token
      for token in constrained.ids_of(constraint.allowed(drawn))
      if pieces.get(token) and left.startswith(pieces[token])
    ]
    if not fitting:
      return False
    drawn.append(max(fitting, key=lambda token: len(pieces[token])))
    left = left.removeprefix(pieces[drawn[-1]])
  return tokenizer.eos_id in constrained.ids_of(constraint.allowed(drawn))


WORD = {"type": "string"}
MARK = str(chat_format.DSML)
BOTH = {"n": {"type": "integer"}, "s": WORD, "m": {"type": ["string", "null"]}}
GOOD = {"n": 3, "s": "a </ b\n<c>", "m": None}


@pytest.mark.parametrize(
  "text,is_kept",
  [
    ("what is it?", True),
    (f"a <{MARK} that begins nothing", True),
    (reply(("f", GOOD)), True),
    (reply(("f", GOOD), ("f", GOOD | {"m": "x", "s": ""}), content="a"), True),
    (reply(("g", {"x": "anything"}), ("f", GOOD)), True),
    (reply(("g", {})), True),
    (reply(("f", GOOD | {"n": "3"})), False),
    (reply(("f", GOOD | {"n": 3.5})), False),
    (reply(("f", GOOD | {"s": None})), False),
    (reply(("f", GOOD | {"o": 1})), False),
    (reply(("f", dict(reversed(GOOD.items())))), False),
    (reply(("f", {"n": 3, "s": ""})), False),
    (reply(("h", {})), False),
    (reply(("f", GOOD)) + "and more", False),
    (reply(("f", GOOD | {"s": f"a/{MARK}parameter>"})), False),
    (reply(("f", GOOD | {"s": f"a</{MARK}parameters"})), False),
    (reply(("f", GOOD)).replace("function_calls>", "function_calls", 1), False),
  ],
)
def test_what_is_kept_to(grammars, tokenizer, text, is_kept):
  constraint = constraint_of(
    grammars, function(parameters(BOTH)), function(FREE, "g", strict=None)
  )
  assert keeps(constraint, tokenizer, text) == is_kept


def test_one_call_and_a_forced_one(grammars, tokenizer):
  one, two = reply(("f", GOOD)), reply(("f", GOOD), ("f", GOOD))
  single = constraint_of(grammars, function(parameters(BOTH)), most=1)
  assert not keeps(single, tokenizer, two)
  for text, is_kept in ((one, True), ("a", False), (f"a{one}", False)):
    forced = constraint_of(grammars, function(parameters(BOTH)), forced=True)
    assert keeps(forced, tokenizer, text) == is_kept
  # Without parameters a line is empty.
  for schema in (None, parameters({})):
    empty = constraint_of(grammars, function(schema), forced=True)
    assert keeps(empty, tokenizer, reply(("f", {})))


def test_thinking_comes_before_and_is_free(grammars, tokenizer):
  rules = call_grammar.CallRules([function(parameters(BOTH))], forced=True)
  new = grammars.calls(rules, thinking=True)
  text = f"{MARK} thinks what{chat_format.THINK_END}" + reply(("f", GOOD))
  assert keeps(new(), tokenizer, text)
  bad = text.replace('string="false">3', 'string="true">3')
  assert bad != text and not keeps(new(), tokenizer, bad)


@pytest.mark.parametrize(
  "schema,message",
  [
    ({"type": "array"}, "of type object"),
    (FREE, "additionalProperties has to be false"),
    (parameters(BOTH, required=["n"]), "required has to name every one"),
    (parameters(BOTH, anyOf=[{}]), "'anyOf' is not supported"),
    (parameters({'a"b': WORD}), "cannot name a parameter"),
    (parameters({"a": {"$ref": "#"}}), "is no definition"),
    (parameters({"a": {"items": {"$ref": "#/properties/a"}}}), "no definition"),
    (parameters({"a": {"$ref": "#/$defs/b"}}), "b"),
    (parameters({"a": {"enum": [f"</{MARK}parameter>"]}}), "a mark of calls"),
    (parameters({"a": False}), "not"),
    (parameters({"a": {"not": {}}}), "not"),
    (parameters({"a": {"type": "string", "pattern": "(?=a)b"}}), "look"),
    (parameters({"a": {"const": "\ud800"}}), "escape"),
    # References that lead nowhere, in a circle.
    (
      parameters(
        {"a": {"$ref": "#/$defs/b"}}, **{"$defs": {"b": {"$ref": "#/$defs/b"}}}
      ),
      "",
    ),
  ],
)
def test_schemas_that_are_not_strict(grammars, schema, message):
  with pytest.raises(ValueError, match=f"tools: .*{message}") as told:
    constraint_of(grammars, function(schema))
  assert "\n" not in str(told.value)
