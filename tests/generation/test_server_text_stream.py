"""Streamed text against the text of all bytes at once."""

import numpy as np
import pytest

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import text_stream


def decode(ids):
  return bytes(ids).decode("utf-8", errors="replace")


def stream(data, stop=()):
  one = text_stream.TextStream(decode, stop)
  return [one.push(byte) for byte in data] + [one.finish()]


def test_characters_come_whole():
  text = "a\u00e9\u4e2d\U0001f600z\ufffd!"
  pieces = stream(text.encode())
  assert "".join(pieces) == text
  assert pieces[:3] == ["a", "", "\u00e9"]


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_read_as_all_at_once(seed):
  data = np.random.default_rng(seed).integers(0, 256, 60).tolist()
  assert "".join(stream(data)) == decode(data)


@pytest.mark.parametrize(
  "data", [b"\xef\xbf\xbd" * 40, b"\xff" * 90, b"\xe4\xb8" * 60, b"\xf0" * 70]
)
def test_what_stays_broken_is_not_read_again_and_again(data):
  longest = 0

  def noting_decode(ids):
    nonlocal longest
    longest = max(longest, len(ids))
    return decode(ids)

  one = text_stream.TextStream(noting_decode)
  pieces = [one.push(byte) for byte in data] + [one.finish()]
  assert "".join(pieces) == decode(data)
  assert longest < 20


@pytest.mark.parametrize("seed", range(60))
def test_broken_text_of_long_tokens_reads_as_all_at_once(seed):
  rng = np.random.default_rng(seed)
  alphabet = [*"a\u00e9\u4e2d\U0001f600\ufffd".encode(), 0xFF, 0xE4]
  draws = [rng.choice(alphabet, rng.integers(1, 4)) for _ in range(60)]
  tokens = [bytes(draw.tolist()) for draw in draws]
  one = text_stream.TextStream(lambda ids: decode(b"".join(ids)))
  pieces = [one.push(token) for token in tokens] + [one.finish()]
  assert "".join(pieces) == decode(b"".join(tokens))


@pytest.mark.parametrize("seed", range(50))
def test_nothing_past_a_stop_string(seed):
  rng = np.random.default_rng(seed)
  text = "".join(rng.choice(list("ab\u00e9"), 40))
  stop = ["".join(rng.choice(list("ab\u00e9"), n)) for n in (4, 5)]
  ends = [n for n in range(41) if any(text[:n].endswith(s) for s in stop)]
  expected = text
  if ends:
    met = [s for s in stop if text[: ends[0]].endswith(s)]
    expected = text[: ends[0] - max(map(len, met))]
  pieces = stream(text.encode(), stop)
  assert "".join(pieces) == expected
  assert all(expected.startswith("".join(pieces[:n])) for n in range(41))
  # Tokens of several characters end it in the same place.
  cuts = [text[n : n + 7] for n in range(0, 40, 7)]
  one = text_stream.TextStream(lambda ids: "".join(cuts[i] for i in ids), stop)
  pieces = [one.push(index) for index in range(len(cuts))] + [one.finish()]
  assert "".join(pieces) == expected
  assert one.stopped == bool(ends)


def test_the_stop_string_that_is_complete_first_wins():
  one = text_stream.TextStream(lambda ids: "abcd" * len(ids), ["abcd", "bc"])
  assert one.push(0) == "a" and one.stopped


def test_ids_that_no_token_has_are_replaced():
  tokenizer = tokenizers.train(["hi there"] * 5, 280)
  hi, none = tokenizer.encode("hi"), tokenizer.vocab_size
  ids = [none, *hi, none, none + 9, *hi]
  assert text_stream.decode(tokenizer, ids) == "\ufffdhi\ufffd\ufffdhi"
  assert text_stream.decode(tokenizer, []) == ""


def test_an_empty_stop_string_is_refused():
  with pytest.raises(ValueError, match="non-empty"):
    text_stream.TextStream(decode, [""])
