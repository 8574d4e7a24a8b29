"""Saved positions: exact resume, and what is refused."""

import dataclasses
import itertools

import pytest

from dsv32_jax.data import files
from dsv32_jax.data import pipeline
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.data.sources import SourceConfig
from tests.support import data_pipelines as tiny


@pytest.mark.parametrize("packing", tiny.PACKINGS)
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_point(packing, workers, tokenizer, tmp_path):
  mixed = (
    dataclasses.replace(tiny.numbered(tmp_path, "a", 11), weight=0.7),
    dataclasses.replace(tiny.numbered(tmp_path, "b", 17), weight=0.3),
  )
  plan = tiny.config(mixed, num_workers=workers, **tiny.PACKINGS[packing])
  whole = tiny.read(plan, tokenizer, 14)
  with pipeline.make_batches(plan, tokenizer) as iterator:
    states = [iterator.get_state()]
    for _ in range(10):
      next(iterator)
      states.append(iterator.get_state())
  for point, state in enumerate(states):
    with pipeline.make_batches(plan, tokenizer) as iterator:
      if point % 2:
        next(iterator)
      iterator.set_state(state)
      assert iterator.get_state() == state
      tiny.assert_equal(
        [next(iterator) for _ in range(4)], whole[point : point + 4]
      )


@pytest.mark.parametrize("packing", tiny.PACKINGS)
def test_resume_of_a_finite_pass(packing, tokenizer, tmp_path):
  plan = tiny.config(
    tiny.numbered(tmp_path),
    num_epochs=1,
    **tiny.PACKINGS[packing],
  )
  whole = tiny.read(plan, tokenizer)
  for point in range(len(whole) + 1):
    with pipeline.make_batches(plan, tokenizer) as iterator:
      for _ in range(point):
        next(iterator)
      state = iterator.get_state()
    with pipeline.make_batches(plan, tokenizer) as iterator:
      iterator.set_state(state)
      tiny.assert_equal(list(iterator), whole[point:])


def test_threads_change_nothing(tokenizer, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path))
  want = tiny.read(plan, tokenizer, 20)
  for workers in (1, 3):
    threaded = dataclasses.replace(plan, num_workers=workers)
    tiny.assert_equal(tiny.read(threaded, tokenizer, 20), want)
  with pipeline.make_batches(plan, tokenizer) as iterator:
    next(iterator)
    state = iterator.get_state()
  with pipeline.make_batches(threaded, tokenizer) as iterator:
    iterator.set_state(state)
    tiny.assert_equal(list(itertools.islice(iterator, 5)), want[1:6])


def test_a_small_cache_changes_nothing(tokenizer, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path))
  small = dataclasses.replace(plan, cache_bytes=100)
  tiny.assert_equal(
    tiny.read(small, tokenizer, 30),
    tiny.read(plan, tokenizer, 30),
  )


def test_bad_records_are_in_the_state(tokenizer, tmp_path):
  path = tmp_path / "a.array_record"
  rows = [{"text": f"fox {i}"} for i in range(6)]
  rows[2] = {"txt": "?"}
  files.write_array_record(path, rows)
  source = SourceConfig(kind="array_record", path=str(path))
  plan = tiny.config(source, max_bad_records=1, num_epochs=1)
  with pipeline.make_batches(plan, tokenizer) as iterator:
    assert len(iterator.bad_records) == 0
    assert len(list(tiny.segments(iterator))) >= 5
    state = iterator.get_state()
    found = iterator.bad_records.entries()
  assert found == [(str(path), 3, "no field 'text'")]
  with pipeline.make_batches(plan, tokenizer) as iterator:
    iterator.set_state(state)
    assert iterator.bad_records.entries() == found
  with pytest.raises(ValueError, match=r"a\.array_record:3: no field 'text'"):
    tiny.read(dataclasses.replace(plan, max_bad_records=0), tokenizer)
  # Reading ahead in threads finds the same.
  threaded = dataclasses.replace(plan, num_workers=2)
  with pipeline.make_batches(threaded, tokenizer) as iterator:
    list(iterator)
    assert iterator.bad_records.entries() == found


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"seed": 5}, r"settings\.seed=0, this run has 5"),
    ({"batch_size": 4}, r"settings\.batch_size"),
    ({"sequence_length": 8}, r"settings\.sequence_length"),
    ({"packing": "first_fit", "sequence_length": 16}, r"settings\.packing"),
  ],
)
def test_a_changed_setting_is_refused(change, name, tokenizer, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path))
  with pipeline.make_batches(plan, tokenizer) as iterator:
    state = iterator.get_state()
  changed = dataclasses.replace(plan, **change)
  with (
    pipeline.make_batches(changed, tokenizer) as iterator,
    pytest.raises(ValueError, match=f"saved with {name}"),
  ):
    iterator.set_state(state)


def test_changed_processes_data_and_tokenizer_are_refused(tokenizer, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path))
  other = tokenizers.train(["something else"] * 3, 280)
  with pipeline.make_batches(plan, tokenizer) as iterator:
    state = iterator.get_state()
  shard = {"process_index": 0, "process_count": 2}
  with (
    pipeline.make_batches(plan, tokenizer, **shard) as iterator,
    pytest.raises(ValueError, match="process_count=1, this run has 2"),
  ):
    iterator.set_state(state)
  with (
    pipeline.make_batches(plan, other) as iterator,
    pytest.raises(ValueError, match="saved with tokenizer="),
  ):
    iterator.set_state(state)
  tiny.numbered(tmp_path, count=24)
  with pipeline.make_batches(plan, tokenizer) as iterator:
    with pytest.raises(ValueError, match="saved with sources="):
      iterator.set_state(state)
    for garbled in (b"", b"[]", b"{}", b'{"manifest": 1}'):
      with pytest.raises(ValueError, match="garbled"):
        iterator.set_state(garbled)
