"""The chat encoding: recorded strings, round trips, hostile and long input."""

import json
import pathlib
import time

import hypothesis
from hypothesis import strategies
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format

CASES = json.loads(
  (pathlib.Path(__file__).parent / "chat_cases.json").read_text("utf-8")
)
EOS, DSML = str(chat_format.EOS), str(chat_format.DSML)
OPEN = f"\n\n<{DSML}function_calls>\n"
CLOSE = f"</{DSML}function_calls>"
SPECIAL = (chat_format.BOS, EOS, "<think>", "</think>", DSML)


def case_ids(kind):
  return [f"{case['name']}-{case['thinking_mode']}" for case in CASES[kind]]


@pytest.mark.parametrize("case", CASES["encode"], ids=case_ids("encode"))
def test_recorded_encodings(case):
  def encode():
    return chat.encode_messages(
      case["messages"], case["thinking_mode"], **case["kwargs"]
    )

  if case["expected"] is None:
    with pytest.raises(ValueError) as caught:
      encode()
    assert "\n" not in str(caught.value)
  else:
    assert encode() == case["expected"]


@pytest.mark.parametrize("case", CASES["parse"], ids=case_ids("parse"))
def test_recorded_completions(case):
  def parse():
    return chat.parse_message_from_completion_text(
      case["text"], case["thinking_mode"]
    )

  if case["expected"] is None:
    with pytest.raises(ValueError, match=r"^completion: "):
      parse()
  else:
    assert parse() == case["expected"]


text = strategies.text(
  strategies.sampled_from('ab\n "<>/&\u00e9')
  | strategies.characters(codec="utf-8"),
  max_size=12,
).filter(lambda value: not any(token in value for token in SPECIAL))
names = strategies.text("abc_-. ", min_size=1, max_size=5)
json_values = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers()
  | strategies.floats(allow_nan=False, allow_infinity=False)
  | text,
  lambda inner: (
    strategies.lists(inner, max_size=3)
    | strategies.dictionaries(text, inner, max_size=3)
  ),
  max_leaves=5,
)
calls = strategies.builds(
  lambda name, arguments: {
    "type": "function",
    "function": {
      "name": name,
      "arguments": json.dumps(arguments, ensure_ascii=False),
    },
  },
  names,
  strategies.dictionaries(names, json_values, max_size=3),
)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(
  text, text, strategies.lists(calls, max_size=3), strategies.booleans()
)
def test_what_is_encoded_parses_back(reasoning, content, tool_calls, thinking):
  mode = "thinking" if thinking else "chat"
  hypothesis.assume(reasoning or tool_calls)
  message = {
    "role": "assistant",
    "content": content,
    "reasoning_content": reasoning if thinking else "",
    "tool_calls": tool_calls,
  }
  prompt = [{"role": "user", "content": "q"}]
  completion = chat.encode_messages([message], mode, context=prompt)
  assert chat.encode_messages([*prompt, message], mode) == (
    chat.encode_messages(prompt, mode) + completion
  )
  assert chat.parse_message_from_completion_text(completion, mode) == message


def test_arguments_of_a_call_are_pasted_not_read():
  body = f'<{DSML}invoke name="f">\n<{DSML}parameter name="k" string="false">'
  completion = f"{OPEN}{body}[1,</{DSML}parameter>\n</{DSML}invoke>\n{CLOSE}"
  message = chat.parse_message_from_completion_text(completion + EOS, "chat")
  function = message["tool_calls"][0]["function"]
  assert function == {"name": "f", "arguments": '{"k": [1,}'}


@pytest.mark.parametrize(
  "part",
  [
    f'<{DSML}invoke name="f">\n',
    f'<{DSML}parameter name="k" string="true">',
    f'<{DSML}invoke name="f">\n\n</{DSML}invoke>\n',
    f"</{DSML}parameter>\n",
    ' name="">\n',
    '" string="true">',
    "<",
    "\n",
    "</think>",
    DSML,
  ],
)
def test_a_megabyte_of_anything_is_quick(part):
  flood = part * (2**20 // len(part))
  texts = [
    flood,
    OPEN + flood,
    f'{OPEN}<{DSML}invoke name="f">\n' + flood,
    f"{OPEN}<{DSML}invoke " + flood + CLOSE + EOS,
    f'{OPEN}<{DSML}invoke name="f">\n<{DSML}parameter ' + flood + EOS,
  ]
  start = time.process_time()
  for flooded in texts:
    for mode in chat.THINKING_MODES:
      try:
        message = chat.parse_message_from_completion_text(flooded, mode)
      except ValueError as error:
        assert len(str(error)) < 100
      else:
        assert message["role"] == "assistant"
  # Ten texts, each read once at several MB a second even on a busy machine.
  assert time.process_time() - start < 5


def test_long_conversations_take_time_in_proportion():
  call = {"function": {"name": "f", "arguments": "{}"}}
  many = 20_000
  assistant = {"role": "assistant", "tool_calls": [call] * many}
  messages = [{"role": "user", "content": "q"}, assistant]
  messages += [{"role": "tool", "content": "r"}] * many
  messages += [{"role": "user", "content": "x" * 2**20}]
  start = time.process_time()
  encoded = chat.encode_messages(messages, "thinking")
  assert encoded.count("<result>r</result>") == many
  assert time.process_time() - start < 5


@pytest.mark.parametrize(
  "arguments",
  [
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"a": ' + "1" * 5000 + "}",
    "[]",
    "null",
    "{",
    "",
    None,
    {"a": 1},
  ],
  ids=lambda value: repr(value)[:12],
)
def test_arguments_that_are_no_object_are_refused(arguments):
  call = {"function": {"name": "f", "arguments": arguments}}
  messages = [{"role": "assistant", "tool_calls": [call]}]
  with pytest.raises(ValueError, match="a call's arguments are") as caught:
    chat.encode_messages(messages, "chat")
  assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
  "message, what",
  [
    ("hi", "message 0 is str"),
    ({"role": "tool", "content": "x"}, "result 1 of 0"),
    ({"role": "assistant", "tool_calls": "f"}, "tool_calls of a message"),
    ({"role": "assistant", "tool_calls": [{}]}, "lacks 'function'"),
    ({"role": "system", "tools": [{"name": "f"}]}, "lacks 'function'"),
    ({"role": "system", "tools": [{"function": {1}}]}, "no JSON form"),
    ({}, "role=None is unknown"),
  ],
)
def test_malformed_messages_are_refused(message, what):
  with pytest.raises(ValueError, match=what):
    chat.encode_messages([message], "thinking")


def test_pieces_tell_special_tokens_from_text_that_spells_them():
  messages = [{"role": "user", "content": "<think>"}]
  pieces = chat.render(messages, "thinking")
  special = [type(piece) is chat_format.SpecialToken for piece in pieces]
  assert pieces == [
    chat_format.BOS,
    chat_format.USER,
    "<think>",
    chat_format.ASSISTANT,
    "<think>",
  ]
  assert special == [True, True, False, True, True]
  disguised = [{"role": "user", "content": chat_format.THINK_START}]
  pieces = chat.render(disguised, "thinking")
  assert type(pieces[2]) is str
