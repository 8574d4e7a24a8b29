"""Tokenizer: special tokens, round trips, files that are none."""

import json
import subprocess
import sys
import threading
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dsv32_jax.data import tokenizer as tokenizers

SPECIAL = tokenizers.SPECIAL_TOKENS
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def test_special_tokens_come_first(tokenizer):
  assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
  ids = [tokenizer.special_id(name) for name in SPECIAL]
  assert ids == list(range(len(SPECIAL)))
  assert len(set(SPECIAL.values())) == len(SPECIAL)
  assert SPECIAL["bos"] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
  assert SPECIAL["user"] == "<\uff5cUser\uff5c>"
  assert SPECIAL["pad"] == "<\uff5c\u2581pad\u2581\uff5c>"


def test_trained_size(tokenizer):
  assert 256 + len(SPECIAL) < tokenizer.vocab_size <= 300


@settings(deadline=None, max_examples=100)
@given(text=TEXT)
def test_every_string_round_trips(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(len(SPECIAL) <= i < tokenizer.vocab_size for i in ids)


PHRASES = ("</end>\n", "</end>\n<next>", '" of="', "\n\n<")
WHOLE = tokenizers.train(
  [f'{word}."' + "".join(PHRASES) for word in "abcdefgh"] * 9, 400, PHRASES
)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.one_of(TEXT, st.sampled_from(PHRASES))))
def test_every_string_round_trips_with_phrases(parts):
  text = "".join(parts)
  assert WHOLE.decode(WHOLE.encode(text)) == text


def test_phrases_are_single_tokens_wherever_they_stand():
  for phrase in PHRASES:
    assert len(WHOLE.encode(phrase)) == 1
  # Signs before it are apart, and the longest one counts.
  one, *rest = WHOLE.encode("a).</end>\n<next>"), WHOLE.encode("a).")
  assert one[:-1] == rest[0]
  assert one[-1:] == WHOLE.encode("</end>\n<next>")


def test_pieces_are_the_same_whether_there_are_phrases():
  """One expression in the place of two: no text is cut in another way."""
  texts = ["it's 12 a1b  c\n\n d, (e) 1234567 f?! \u00e9\u4e2d"] * 9
  plain = tokenizers.train(texts, 400)
  other = tokenizers.train(texts, 400, ["no such phrase"])
  for text in (*texts, "a 12 b  ", " 1 2 ", "x\n\n\n3", "..a..1"):
    assert [plain.decode([x]) for x in plain.encode(text)] == [
      other.decode([x]) for x in other.encode(text)
    ]


@settings(deadline=None, max_examples=60)
@given(
  parts=st.lists(st.one_of(TEXT, st.sampled_from(sorted(SPECIAL.values()))))
)
def test_special_strings_in_text_are_text(tokenizer, parts):
  text = "".join(parts)
  ids = tokenizer.encode(text)
  assert not set(ids) & set(range(len(SPECIAL)))
  assert tokenizer.decode(ids) == text
  assert tokenizer.encode_released(text) == ids


def test_other_threads_go_on_while_a_long_text_is_encoded(tokenizer):
  text = "what is it 12 ab\n" * 40_000
  thread = threading.Thread(target=tokenizer.encode_released, args=(text,))
  thread.start()
  turns = 0
  while thread.is_alive():
    turns += 1
    time.sleep(0.001)
  # Were they held up, this one would have had a turn or two.
  assert turns > 20


def test_rendered_strings_and_parts(tokenizer):
  rendered = SPECIAL["bos"] + SPECIAL["user"] + "hi" + SPECIAL["eos"]
  plain = tokenizer.encode("hi")
  user = tokenizer.special_id("user")
  assert tokenizer.encode_rendered(rendered) == [0, user, *plain, 1]
  assert tokenizer.encode_parts([0, user, "hi", 1]) == [0, user, *plain, 1]
  assert tokenizer.decode([0, user, *plain, 1]) == rendered
  assert tokenizer.decode([0, *plain, 1], skip_special_tokens=True) == "hi"


def test_save_and_load(tokenizer, tmp_path):
  path = tmp_path / "folder" / "tokenizer.json"
  tokenizer.save(path)
  again = tokenizers.load(path)
  text = "def g(y): return <think> 12345 \u00e4\n"
  assert again.encode(text) == tokenizer.encode(text)
  assert again.fingerprint == tokenizer.fingerprint
  assert [x.name for x in path.parent.iterdir()] == ["tokenizer.json"]


def test_training_is_the_same_in_another_process(tokenizer):
  program = (
    "from dsv32_jax.data import tokenizer\n"
    "texts = ['def f(x):\\n  return x + 1\\n', 'the quick brown fox'] * 20\n"
    "print(tokenizer.train(texts, 300).fingerprint)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == tokenizer.fingerprint


def test_tokens_not_marked_special_are_text_too(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  content = json.loads(path.read_text(encoding="utf-8"))
  for token in content["added_tokens"]:
    token["special"] = False
  path.write_text(json.dumps(content), encoding="utf-8")
  again = tokenizers.load(path)
  text = "a" + SPECIAL["user"] + "<think>"
  assert again.encode(text) == tokenizer.encode(text)
  assert again.decode([0, 3], skip_special_tokens=True) == ""


def test_truncation_and_padding_are_not_taken_over(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  content = json.loads(path.read_text(encoding="utf-8"))
  content["truncation"] = {
    "direction": "Right",
    "max_length": 2,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  path.write_text(json.dumps(content), encoding="utf-8")
  text = "the quick brown fox" * 5
  assert tokenizers.load(path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"not json",
    b"[" * 100_000,
    b"[]",
    b"{}",
    b"\xff\xfe",
    b'{"model": {"type": "BPE"}}',
    b'{"model": {"type": "Nothing", "vocab": {}}}',
    b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
    b'{"model": {"type": "BPE", "vocab": {"a": -5}, "merges": [["b", "c"]]}}',
    b'{"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.5}}',
    b'{"model": {"type": "BPE"}, "added_tokens": [{"id": "0"}]}',
    b'{"model": {"type": "BPE"}, "added_tokens": {"a": 1}}',
  ],
)
def test_garbled_file_is_one_line_that_names_it(content, tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
    tokenizers.load(path)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 400 + len(str(path))


def test_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
    tokenizers.load(tmp_path / "none.json")


def test_a_plain_text_way_to_a_special_token_is_refused(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  content = json.loads(path.read_text(encoding="utf-8"))
  word = "x"
  token_id = content["model"]["vocab"][word]
  content["added_tokens"].append(
    {**content["added_tokens"][0], "content": word, "id": token_id}
  )
  path.write_text(json.dumps(content), encoding="utf-8")
  with pytest.raises(ValueError, match="even as plain text"):
    tokenizers.load(path)


def test_a_huge_token_id_is_refused(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer.save(path)
  content = json.loads(path.read_text(encoding="utf-8"))
  content["model"]["vocab"]["far"] = 2**31
  path.write_text(json.dumps(content), encoding="utf-8")
  with pytest.raises(ValueError, match="token id 2147483648"):
    tokenizers.load(path)


def test_bad_arguments(tokenizer):
  with pytest.raises(ValueError, match="none of"):
    tokenizer.special_id("nothing")
  with pytest.raises(ValueError, match="token_id=-1"):
    tokenizer.decode([-1])
  with pytest.raises(ValueError, match="vocab_size=100"):
    tokenizers.train(["text"], 100)
  with pytest.raises(ValueError, match="sample_bytes=0"):
    tokenizers.TokenizerConfig(sample_bytes=0)
