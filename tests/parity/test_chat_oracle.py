"""The chat encoding equals the recorded strings of the official code."""

import json

import pytest

from dsv32_jax.agents import chat

pytestmark = pytest.mark.parity


def cases(oracle_folder, kind):
  path = oracle_folder / "encoding" / "cases.json"
  found = json.loads(path.read_text(encoding="utf-8"))[kind]
  assert found
  return found


def test_encoded_messages_are_the_same_bytes(oracle_folder):
  for case in cases(oracle_folder, "encode"):
    arguments = (case["messages"], case["thinking_mode"])
    if case.get("expected") is None:
      with pytest.raises(ValueError):
        chat.encode_messages(*arguments, **case["kwargs"])
    else:
      got = chat.encode_messages(*arguments, **case["kwargs"])
      assert got == case["expected"], case["name"]


def test_parsed_completions_are_the_same(oracle_folder):
  for case in cases(oracle_folder, "parse"):
    arguments = (case["text"], case["thinking_mode"])
    if case.get("expected") is None:
      with pytest.raises(ValueError):
        chat.parse_message_from_completion_text(*arguments)
    else:
      got = chat.parse_message_from_completion_text(*arguments)
      assert got == case["expected"], case["name"]
