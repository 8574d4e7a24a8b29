"""Every recorded string of the official chat encoding."""

import json

import pytest

from dsv32_jax.agents import chat

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def cases(oracle_folder):
  path = oracle_folder / "encoding" / "cases.json"
  return json.loads(path.read_text(encoding="utf-8"))


def check(case, function):
  if "error" in case:
    with pytest.raises(ValueError):
      function()
  else:
    assert function() == case["expected"], case["name"]


def test_every_recorded_encoding(cases):
  assert len(cases["encode"]) >= 39
  for case in cases["encode"]:
    check(
      case,
      lambda case=case: chat.encode_messages(
        case["messages"], case["thinking_mode"], **case["kwargs"]
      ),
    )


def test_every_recorded_completion(cases):
  assert len(cases["parse"]) >= 9
  for case in cases["parse"]:
    check(
      case,
      lambda case=case: chat.parse_message_from_completion_text(
        case["text"], case["thinking_mode"]
      ),
    )
