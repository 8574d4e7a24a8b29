"""Sources: what they read, and what they say of what they cannot."""

import json
import logging

import pyarrow
from pyarrow import parquet
import pytest

from dsv32_jax.data import files
from dsv32_jax.data import records
from dsv32_jax.data import sources
from dsv32_jax.data.bad_records import BadRecords
from dsv32_jax.data.sources import SourceConfig

TEXTS = ["alpha", "beta \u00e4", "gamma\nline"]


def opened(budget=0, **config):
  ledger = BadRecords(budget)
  return sources.open_source(SourceConfig(**config), ledger), ledger


def read(source):
  return [source[index] for index in range(len(source))]


def write_text(folder):
  for number, text in enumerate(TEXTS):
    (folder / f"{number}.txt").write_text(text, encoding="utf-8")
  return str(folder / "*.txt")


def write_jsonl(folder):
  lines = [json.dumps({"text": text, "n": 1}) for text in TEXTS]
  path = folder / "data.jsonl"
  path.write_text("\n".join(lines), encoding="utf-8")
  return str(path)


def write_parquet(folder):
  path = folder / "data.parquet"
  table = pyarrow.table({"text": TEXTS, "n": [1, 2, 3]})
  parquet.write_table(table, path, row_group_size=2)
  return str(path)


def write_array_record(folder):
  path = folder / "data.array_record"
  files.write_array_record(path, [{"text": text} for text in TEXTS])
  return str(path)


WRITE = {
  "text": write_text,
  "jsonl": write_jsonl,
  "parquet": write_parquet,
  "array_record": write_array_record,
}


@pytest.mark.parametrize("kind", WRITE)
def test_reads_every_record(kind, tmp_path):
  source, ledger = opened(kind=kind, path=WRITE[kind](tmp_path))
  assert read(source) == [{"text": text} for text in TEXTS]
  assert len(ledger) == 0 and ledger.entries() == []
  assert source.place(2)[0].startswith(str(tmp_path))


@pytest.mark.parametrize("kind", WRITE)
def test_identity_follows_content_not_folder(kind, tmp_path):
  identities = []
  for name in ("here", "there"):
    (tmp_path / name).mkdir()
    path = WRITE[kind](tmp_path / name)
    identities.append(opened(kind=kind, path=path)[0].identity)
  assert identities[0] == identities[1]
  if kind == "jsonl":
    with open(path, "a", encoding="utf-8") as file:
      file.write('\n{"text": "more"}')
    assert opened(kind=kind, path=path)[0].identity != identities[0]


def test_files_of_a_glob_in_order(tmp_path):
  for name in ("b", "a"):
    (tmp_path / name).mkdir()
    for number in (2, 1):
      files.write_array_record(
        tmp_path / name / f"{number}.ar",
        [{"text": f"{name}{number}{row}"} for row in range(3)],
      )
  source, _ = opened(kind="array_record", path=str(tmp_path / "**" / "*.ar"))
  want = [f"{n}{f}{r}" for n in "ab" for f in "12" for r in range(3)]
  assert [x["text"] for x in read(source)] == want
  assert source.place(4) == (str(tmp_path / "a" / "2.ar"), 2)


BAD_LINES = {
  "bad JSON": b'{"text": "x"',
  "an array, not an object": b'["text"]',
  "missing field": b'{"txt": "x"}',
  "not a string": b'{"text": 5}',
  "null": b'{"text": null}',
  "empty": b'{"text": ""}',
  "invalid UTF-8": b'{"text": "\xff"}',
  "half a surrogate pair": b'{"text": "\\ud800"}',
  "a key twice": b'{"text": "x", "text": "y"}',
  "deep nesting": b'{"text": ' + b"[" * 100_000,
  "a number too long": b'{"text": ' + b"1" * 5000 + b"}",
  "truncated": b'{"te',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_malformed_line(line, tmp_path, caplog):
  path = tmp_path / "data.jsonl"
  good = b'{"text": "good"}'
  path.write_bytes(b"\r\n".join([good, b"", line, good, b""]))
  with pytest.raises(ValueError, match=r"data\.jsonl:3: .*max_bad_records=0"):
    opened(kind="jsonl", path=str(path))
  with caplog.at_level(logging.WARNING):
    source, ledger = opened(budget=1, kind="jsonl", path=str(path))
  assert read(source) == [{"text": "good"}] * 2
  assert source.place(1) == (str(path), 4)
  assert [x[:2] for x in ledger.entries()] == [(str(path), 3)]
  assert f"{path}:3: " in caplog.text
  assert "\n" not in caplog.messages[0]


def test_the_budget_counts_over_files_and_sources(tmp_path):
  for name in ("a", "b"):
    lines = ['{"text": "x"}', "oops", '{"text": "y"}', "oops"]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  path = str(tmp_path / "*.jsonl")
  ledger = BadRecords(7)
  config = SourceConfig(kind="jsonl", path=path)
  sources.open_source(config, ledger)
  assert len(ledger) == 4
  sources.open_source(config, ledger)
  assert len(ledger) == 4, "the same record counts once"
  with pytest.raises(ValueError, match=r"b\.jsonl:4: .*\(bad record 4"):
    opened(budget=3, kind="jsonl", path=path)


def test_byte_order_marks(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
  assert read(opened(kind="jsonl", path=str(path))[0]) == [{"text": "x"}]
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbfx")
  assert read(opened(kind="text", path=str(path))[0]) == [{"text": "x"}]


@pytest.mark.parametrize("kind", WRITE)
def test_empty_file(kind, tmp_path):
  path = WRITE[kind](tmp_path)
  empty = tmp_path / ("zz" + path[path.rindex(".") :])
  empty.write_bytes(b"")
  pattern = str(tmp_path / ("*" + path[path.rindex(".") :]))
  with pytest.raises(ValueError, match=r"zz\.[a-z_]+:0: "):
    opened(kind=kind, path=pattern)
  source, ledger = opened(budget=1, kind=kind, path=pattern)
  assert len(source) == len(TEXTS)
  assert [x[:2] for x in ledger.entries()] == [(str(empty), 0)]
  with pytest.raises(ValueError, match="no usable record"):
    opened(budget=1, kind=kind, path=str(empty))


def test_text_file_that_is_not_utf8(tmp_path):
  pattern = write_text(tmp_path)
  (tmp_path / "bad.txt").write_bytes(b"fine\nfine\nnot \xff fine")
  with pytest.raises(ValueError, match=r"bad\.txt:0: invalid UTF-8 in line 3"):
    opened(kind="text", path=pattern)
  source, ledger = opened(budget=1, kind="text", path=pattern)
  assert (len(source), len(ledger)) == (3, 1)


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
@pytest.mark.parametrize("fault", ["truncated", "garbage"])
def test_damaged_file(kind, fault, tmp_path):
  path = WRITE[kind](tmp_path)
  with open(path, "rb") as file:
    content = file.read()
  damaged = {"truncated": content[:-7], "garbage": b"x" * len(content)}
  with open(path, "wb") as file:
    file.write(damaged[fault])
  with pytest.raises(ValueError, match=":0: not a whole ") as error:
    opened(kind=kind, path=path)
  assert "\n" not in str(error.value)


def test_one_flipped_byte_costs_one_array_record(tmp_path):
  path = write_array_record(tmp_path)
  with open(path, "rb") as file:
    content = file.read()
  place = content.index(b"beta")
  with open(path, "wb") as file:
    file.write(content[:place] + b"X" + content[place + 1 :])
  source, _ = opened(kind="array_record", path=path)
  assert source[0] == {"text": TEXTS[0]}
  with pytest.raises(ValueError, match=r"data\.array_record:2: "):
    source[1]
  source, ledger = opened(budget=1, kind="array_record", path=path)
  assert [x and x["text"] for x in read(source)] == [TEXTS[0], None, TEXTS[2]]
  read(source)
  assert [x[:2] for x in ledger.entries()] == [(path, 2)]


def test_array_record_of_bad_records_only(tmp_path):
  path = tmp_path / "data.array_record"
  files.write_array_record(path, [{"txt": "x"}] * 2)
  source, _ = opened(budget=9, kind="array_record", path=str(path))
  assert source[0] is None
  with pytest.raises(ValueError, match="no usable record"):
    source[1]


def test_parquet_rows_and_columns(tmp_path):
  path = str(tmp_path / "a.parquet")
  table = pyarrow.table({"text": ["x", None, "", "y"], "n": [1, 2, 3, 4]})
  parquet.write_table(table, path)
  source, ledger = opened(budget=2, kind="parquet", path=path)
  assert [x["text"] for x in read(source)] == ["x", "y"]
  assert [x[1] for x in ledger.entries()] == [2, 3]
  assert source.place(1) == (path, 4)
  with pytest.raises(ValueError, match=r"a\.parquet:0: no column \['body'\]"):
    opened(kind="parquet", path=path, text_field="body")
  with pytest.raises(ValueError, match="column 'n' is int64, not string"):
    opened(kind="parquet", path=path, text_field="n")


def test_prompt_and_response(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"q": "1+1", "a": "2"}\n{"q": "2+2"}\n')
  config = {"prompt_field": "q", "response_field": "a"}
  source, ledger = opened(budget=1, kind="jsonl", path=str(path), **config)
  assert read(source) == [{"q": "1+1", "a": "2"}]
  assert ledger.entries() == [(str(path), 2, "no field 'a'")]


def test_paths_that_match_nothing(tmp_path):
  with pytest.raises(ValueError, match="matches no file"):
    opened(kind="text", path=str(tmp_path / "*.txt"))
  with pytest.raises(ValueError, match="is a folder: give a glob"):
    opened(kind="text", path=str(tmp_path))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"kind": "csv", "path": "x"}, "kind='csv' is none of"),
    ({"kind": "text"}, "path=None does not go with"),
    ({"kind": "stdlib_train", "path": "x"}, "path='x' does not go with"),
    ({"kind": "text", "path": "x", "weight": 0.0}, r"weight=0\.0"),
    ({"kind": "text", "path": "x", "weight": float("nan")}, "weight=nan"),
    ({"kind": "jsonl", "path": "x", "prompt_field": "q"}, "go together"),
    (
      {
        "kind": "text",
        "path": "x",
        "prompt_field": "q",
        "response_field": "a",
      },
      "prompt_field='q' does not go with",
    ),
  ],
)
def test_bad_config(config, message):
  with pytest.raises(ValueError, match=message):
    SourceConfig(**config)


def test_negative_budget():
  with pytest.raises(ValueError, match="max_bad_records=-1"):
    BadRecords(-1)


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_sample_visits_each_record_once(length):
  documents = [{"text": str(number)} for number in range(length)]
  got = list(sources.sample_texts(documents, 10**6))
  assert sorted(got, key=int) == [x["text"] for x in documents]
  assert len(list(sources.sample_texts(documents, 1))) == 1


def test_standard_library_sides():
  train, _ = opened(kind="stdlib_train")
  held_out, _ = opened(kind="stdlib_held_out", text_field="body")
  assert train.identity != held_out.identity
  assert len(train) > len(held_out)
  assert held_out[0]["body"]
  assert held_out.place(0)[0].endswith(".py")


def test_parse_record_keeps_the_fields_asked_for():
  line = b'{"a": "x", "b": {"c": [1, NaN]}, "d": "y"}'
  assert records.parse_record(line, ("d", "a")) == {"d": "y", "a": "x"}
