"""The pipeline: packing, mixing, sharding, masks."""

import collections
import dataclasses
import itertools

from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dsv32_jax import config_files
from dsv32_jax.data import pipeline
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.data.pipeline import DataConfig
from dsv32_jax.data.sources import SourceConfig
from tests.support import data_pipelines as tiny

FRESH = settings(
  deadline=None,
  max_examples=25,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WORDS = st.text("abc de", min_size=1, max_size=40)


@FRESH
@given(
  documents=st.lists(WORDS, min_size=1, max_size=12),
  length=st.integers(1, 40),
  size=st.integers(1, 3),
)
def test_concat_is_the_stream_cut_into_rows(
  documents, length, size, tokenizer, tmp_path
):
  source = tiny.texts(tmp_path, "a", documents)
  got = tiny.read(
    tiny.config(
      source,
      sequence_length=length,
      batch_size=size,
      seed=None,
      num_epochs=1,
    ),
    tokenizer,
  )
  stream = []
  for document in documents:
    stream += [0, *tokenizer.encode(document), 1]
  rows = [stream[i : i + length] for i in range(0, len(stream), length)]
  assert len(got) == -(-len(rows) // size)
  padded = [x for batch in got for x in zip(batch.tokens_BT, batch.segments_BT)]
  for row, (tokens_T, segments_T) in itertools.zip_longest(
    rows, padded, fillvalue=[]
  ):
    assert tokens_T[segments_T > 0].tolist() == row
    assert (segments_T > 0).sum() == len(row)
  for batch in got:
    tiny.check_invariants(batch)
    # Every target that exists is learnt.
    learnt = int(batch.loss_mask_BT.sum())
    assert learnt == sum(len(x) - 1 for x in tiny.segments([batch]))


@FRESH
@given(
  documents=st.lists(WORDS, min_size=1, max_size=25),
  size=st.integers(1, 3),
  bins=st.integers(1, 5),
)
def test_first_fit_keeps_every_document_whole(
  documents, size, bins, tokenizer, tmp_path
):
  source = tiny.texts(tmp_path, "a", documents)
  got = tiny.read(
    tiny.config(
      source,
      sequence_length=48,
      batch_size=size,
      packing="first_fit",
      packing_bins=bins,
      num_epochs=2,
    ),
    tokenizer,
  )
  want = collections.Counter(
    (0, *tokenizer.encode(document), 1) for document in documents
  )
  for key in want:
    want[key] *= 2
  assert collections.Counter(map(tuple, tiny.segments(got))) == want
  for batch in got:
    tiny.check_invariants(batch)


def test_a_document_too_long_for_a_row_is_reported(tokenizer, tmp_path):
  source = tiny.texts(tmp_path, "a", ["fox", "q" * 60, "brown"])
  first_fit = tiny.config(source, packing="first_fit", num_epochs=1)
  with pytest.raises(ValueError, match=r"a\.jsonl:2: 62 tokens are above 16"):
    tiny.read(first_fit, tokenizer)
  tolerant = dataclasses.replace(first_fit, max_bad_records=1)
  with pipeline.make_batches(tolerant, tokenizer) as iterator:
    assert len(list(tiny.segments(iterator))) == 2
    assert len(iterator.bad_records) == 1
  alone = tiny.config(
    tiny.texts(tmp_path, "b", ["q" * 60]),
    packing="first_fit",
    max_bad_records=5,
  )
  with pytest.raises(ValueError, match="no usable record"):
    tiny.read(alone, tokenizer, 1)


def test_seed_and_epochs(tokenizer, tmp_path):
  source = tiny.numbered(tmp_path)
  one = tiny.config(
    source, num_epochs=1, batch_size=1, **tiny.PACKINGS["first_fit"]
  )
  by_seed = [
    list(
      tiny.segments(tiny.read(dataclasses.replace(one, seed=seed), tokenizer))
    )
    for seed in (None, 0, 1, 0)
  ]
  assert by_seed[1] == by_seed[3] != by_seed[2]
  assert by_seed[0] != by_seed[1]
  assert all(sorted(x) == sorted(by_seed[0]) for x in by_seed)
  # The second epoch has another order than the first.
  rows = {"sequence_length": 5000, "batch_size": 1}
  twice = tiny.read(tiny.config(source, num_epochs=2, **rows), tokenizer)
  order = list(tiny.segments(twice))
  assert order[:23] != order[23:]
  assert sorted(order[:23]) == sorted(order[23:])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_see_disjoint_data_that_is_everything(
  count, tokenizer, tmp_path
):
  plan = tiny.config(
    tiny.numbered(tmp_path),
    num_epochs=1,
    batch_size=6,
    **tiny.PACKINGS["first_fit"],
  )
  whole = sorted(tiny.segments(tiny.read(plan, tokenizer)))
  shares = [
    list(
      tiny.segments(
        tiny.read(plan, tokenizer, process_index=i, process_count=count)
      )
    )
    for i in range(count)
  ]
  assert sorted(itertools.chain(*shares)) == whole
  assert len(whole) == 23
  assert {len(share) for share in shares} <= {23 // count, 23 // count + 1}
  one = tiny.read(plan, tokenizer, process_index=1, process_count=count)
  assert one[0].tokens_BT.shape == (6 // count, 40)


def test_mixture_is_exact_in_rows(tokenizer, tmp_path):
  weights = {"a": 0.7, "b": 0.1, "c": 0.2}
  mixed = tuple(
    dataclasses.replace(tiny.texts(tmp_path, name, [name * 40]), weight=weight)
    for name, weight in weights.items()
  )
  plan = tiny.config(mixed, sequence_length=8, batch_size=10)
  names = {tokenizer.encode(x * 40)[1]: x for x in weights}
  for batch in tiny.read(plan, tokenizer, 6):
    counts = collections.Counter()
    for tokens_T in batch.tokens_BT:
      found = {names[x] for x in tokens_T.tolist() if x in names}
      assert len(found) == 1
      counts[found.pop()] += 1
    assert counts == {"a": 7, "b": 1, "c": 2}


def test_only_the_response_is_learnt(tokenizer, tmp_path):
  rows = [
    {"q": "What is <think> 1+1?", "a": "two"},
    {"q": "the fox", "a": "a quick brown one"},
  ]
  source = dataclasses.replace(
    tiny.jsonl(tmp_path, "sft", rows),
    prompt_field="q",
    response_field="a",
  )
  plan = tiny.config(
    source,
    packing="first_fit",
    sequence_length=120,
    batch_size=1,
    seed=None,
    num_epochs=1,
  )
  (batch,) = tiny.read(plan, tokenizer)
  special = tokenizer.special_id
  want_tokens, want_mask = [], []
  for row in rows:
    prompt, answer = tokenizer.encode(row["q"]), tokenizer.encode(row["a"])
    opening = [0, special("user"), *prompt]
    opening += [special("assistant"), special("think_end")]
    want_tokens += [*opening, *answer, 1]
    # The last token of the opening predicts the first of the answer.
    want_mask += [0] * (len(opening) - 1) + [1] * (len(answer) + 1) + [0]
  length = len(want_tokens)
  assert batch.tokens_BT[0, :length].tolist() == want_tokens
  assert batch.loss_mask_BT[0, :length].tolist() == want_mask
  assert not batch.segments_BT[0, length:].any()
  learnt = batch.targets_BT[batch.loss_mask_BT > 0].tolist()
  assert tokenizer.decode(learnt) == "".join(
    row["a"] + tokenizers.SPECIAL_TOKENS["eos"] for row in rows
  )
  assert special("think_start") not in want_tokens


def test_special_strings_in_documents_are_text(tokenizer, tmp_path):
  text = "a" + "".join(tokenizers.SPECIAL_TOKENS.values())
  plan = tiny.config(
    tiny.texts(tmp_path, "a", [text]),
    sequence_length=400,
    batch_size=1,
    num_epochs=1,
  )
  (document,) = tiny.segments(tiny.read(plan, tokenizer))
  num_special = len(tokenizers.SPECIAL_TOKENS)
  assert [x for x in document if x < num_special] == [0, 1]
  assert tokenizer.decode(document[1:-1]) == text


def test_a_config_file_gives_the_config():
  given = {
    "sources": [{"kind": "jsonl", "path": "x", "weight": 0.5}],
    "sequence_length": 16,
    "batch_size": 2,
    "tokenizer": {"vocab_size": 500},
  }
  built = config_files.build(DataConfig, given)
  assert built == DataConfig(
    sources=(SourceConfig(kind="jsonl", path="x", weight=0.5),),
    sequence_length=16,
    batch_size=2,
    tokenizer=tokenizers.TokenizerConfig(vocab_size=500),
  )
  assert config_files.build(DataConfig, config_files.dump(built)) == built


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"sources": ()}, "sources is empty"),
    ({"sequence_length": 0}, "sequence_length=0"),
    ({"num_workers": -1}, "num_workers=-1"),
    ({"packing": "best"}, "packing='best'"),
    ({"seed": -1}, "seed=-1"),
    ({"num_epochs": 0}, "num_epochs=0"),
  ],
)
def test_bad_config(change, message, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path))
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(plan, **change)


def test_bad_shares(tokenizer, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path, count=2), batch_size=6)
  with pytest.raises(ValueError, match="2 records for 3 streams"):
    tiny.read(plan, tokenizer, process_index=0, process_count=3)
  with pytest.raises(ValueError, match=r"batch_size=6 is not a multiple"):
    tiny.read(plan, tokenizer, process_index=0, process_count=4)
  with pytest.raises(ValueError, match="process_index=2"):
    tiny.read(plan, tokenizer, process_index=2, process_count=2)
  two = (
    tiny.numbered(tmp_path, "a"),
    tiny.numbered(tmp_path, "b"),
  )
  with pytest.raises(ValueError, match="a finite pass takes one"):
    tiny.config(two, num_epochs=1)


def test_the_standard_library_trains_a_tokenizer_and_fills_batches():
  plan = DataConfig(
    sources=(SourceConfig(kind="stdlib_train"),),
    sequence_length=64,
    batch_size=2,
    tokenizer=tokenizers.TokenizerConfig(vocab_size=512, sample_bytes=100_000),
  )
  tokenizer = pipeline.make_tokenizer(plan)
  assert tokenizer.vocab_size == 512
  assert tokenizer.fingerprint == pipeline.make_tokenizer(plan).fingerprint
  for batch in tiny.read(plan, tokenizer, 5):
    tiny.check_invariants(batch)
    assert (batch.segments_BT > 0).all()


def test_a_tokenizer_file_is_used(tokenizer, tmp_path):
  path = str(tmp_path / "tokenizer.json")
  tokenizer.save(path)
  plan = tiny.config(
    tiny.numbered(tmp_path),
    tokenizer=tokenizers.TokenizerConfig(path=path),
  )
  assert pipeline.make_tokenizer(plan).fingerprint == tokenizer.fingerprint
