"""Replies read piece by piece against the reader of whole ones."""

import itertools
import json

import numpy as np
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.agents import chat_parse
from dsv32_jax.generation.server import chat_stream

USER = {"role": "user", "content": "?"}
# Beginnings and ends of the format's own marks, to be told from them.
FRAGMENTS = (
  *"ab\n</",
  "\n\n",
  "\u00e9",
  "</think",
  "<" + chat_format.DSML[:4],
  chat_parse.CALLS_START[:7],
)


def random_text(rng, most=12):
  return "".join(rng.choice(FRAGMENTS, rng.integers(0, most)))


def random_reply(rng):
  """An assistant message and the text that a model writes for it."""
  calls = []
  for _ in range(rng.integers(0, 4)):
    arguments = {
      f"k{n}{random_text(rng, 2)}": rng.choice([random_text(rng), "1"])
      for n in range(rng.integers(0, 3))
    }
    arguments["n"] = int(rng.integers(9))
    function = {"name": f"f{rng.integers(9)}", "arguments": arguments}
    function["arguments"] = json.dumps(arguments)
    calls.append({"type": "function", "function": function})
  thinking = bool(rng.integers(2))
  message = {
    "role": "assistant",
    "content": random_text(rng),
    "reasoning_content": random_text(rng) + "." if thinking else "",
    "tool_calls": calls,
  }
  mode = "thinking" if thinking else "chat"
  text = chat.encode_messages([message], mode, context=[USER])
  return thinking, text.removesuffix(chat_format.EOS)


def read(pieces, *, thinking, with_tools=True):
  stream = chat_stream.ChatStream(thinking=thinking, with_tools=with_tools)
  deltas = [stream.push(piece) for piece in pieces] + [stream.finish()]
  return sum(deltas, start=chat_stream.Delta())


def cut(rng, text):
  places = sorted(rng.integers(0, len(text) + 1, rng.integers(0, 20)))
  edges = [0, *places, len(text)]
  return [text[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("seed", range(200))
def test_pieces_add_up_to_what_the_format_says(seed):
  rng = np.random.default_rng(seed)
  thinking, text = random_reply(rng)
  want = chat_parse.parse(text + chat_format.EOS, thinking=thinking)
  for pieces in (list(text), [text], cut(rng, text)):
    got = read(pieces, thinking=thinking)
    assert got.content == want["content"]
    assert got.reasoning == want["reasoning_content"]
    calls = [call["function"] for call in want["tool_calls"]]
    assert [vars(call) for call in got.calls] == calls


@pytest.mark.parametrize("seed", range(200))
def test_of_a_damaged_reply_nothing_is_lost(seed):
  rng = np.random.default_rng(seed)
  thinking, text = random_reply(rng)
  start = int(rng.integers(0, len(text) + 1))
  if seed % 2:
    text = text[:start]  # broken off
  else:
    text = text[:start] + random_text(rng) + text[start + rng.integers(5) :]
  whole = read([text], thinking=thinking)
  for pieces in (list(text), cut(rng, text)):
    assert read(pieces, thinking=thinking) == whole
  if not whole.calls:
    marks = len(chat_format.THINK_END) if thinking else 0
    left = len(text) - len(whole.reasoning) - len(whole.content)
    assert left in (0, marks)
    assert text.startswith(whole.reasoning) and text.endswith(whole.content)
  for call in whole.calls:
    assert isinstance(json.loads(call.arguments), dict)


def call_text(value, name="f", kind="false"):
  mark = chat_format.DSML
  return (
    f'<{mark}invoke name="{name}">\n<{mark}parameter name="k"'
    f' string="{kind}">{value}</{mark}parameter>\n</{mark}invoke>'
  )


def block(*calls):
  inner = "\n".join(calls)
  mark = chat_format.DSML
  return f"\n\n<{mark}function_calls>\n{inner}\n</{mark}function_calls>"


def test_a_call_that_no_later_prompt_could_hold_is_content():
  text = "hi" + block(call_text("[1]"), call_text("{broken"))
  got = read(list(text), thinking=False)
  assert [vars(call) for call in got.calls] == [
    {"name": "f", "arguments": '{"k": [1]}'}
  ]
  assert got.content.startswith("hi>\n<") and "{broken" in got.content
  deep = block(call_text("[" * 100_000))
  assert read([deep], thinking=False).content == deep


def test_a_parameter_may_hold_the_end_of_a_call():
  value = f"x</{chat_format.DSML}invoke>y"
  got = read(list(block(call_text(value, kind="true"))), thinking=False)
  assert json.loads(got.calls[0].arguments) == {"k": value}


def test_without_tools_calls_are_content():
  text = block(call_text("1"))
  got = read(list(text), thinking=False, with_tools=False)
  assert got == chat_stream.Delta(content=text)


def test_text_comes_as_soon_as_it_is_certain():
  stream = chat_stream.ChatStream(thinking=True, with_tools=True)
  assert stream.push("ab<").reasoning == "ab"
  assert stream.push("b</think>c\n") == chat_stream.Delta(
    reasoning="<b", content="c"
  )
  assert stream.push("d").content == "\nd"
  (call,) = stream.push(block(call_text("1"))[:-3]).calls
  assert call.name == "f"
  assert not stream.finish()
