"""Saved positions: exact resume, and what is refused."""

import dataclasses
import itertools

import jax
import numpy as np
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
  goes_on_at_every_point(plan, tokenizer)


def goes_on_at_every_point(plan, tokenizer):
  """Returns all batches of a finite pass."""
  whole = tiny.read(plan, tokenizer)
  for point in range(len(whole) + 1):
    with pipeline.make_batches(plan, tokenizer) as iterator:
      for _ in range(point):
        next(iterator)
      state = iterator.get_state()
    with pipeline.make_batches(plan, tokenizer) as iterator:
      iterator.set_state(state)
      tiny.assert_equal(list(iterator), whole[point:])
  return whole


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
    pytest.raises(
      ValueError, match="1 streams, which process_count=2 cannot share"
    ),
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
    with pytest.raises(ValueError, match="garbled"):
      iterator.set_state()
    own = iterator.get_state()
    # Of two processes that take the same rows.
    iterator.set_state(own, own)
  with pipeline.make_batches(plan, tokenizer, **shard) as iterator:
    half = iterator.get_state()
    with pytest.raises(ValueError, match=r"garbled: positions \[0\] of 2"):
      iterator.set_state(half, half)


def together(plan, tokenizer, processes, count, states=None):
  """Reads global batches as so many processes; also their states behind."""
  parts, after = [], []
  for index in range(processes):
    with pipeline.make_batches(
      plan, tokenizer, process_index=index, process_count=processes
    ) as iterator:
      if states is not None:
        iterator.set_state(*states)
      parts.append(list(itertools.islice(iterator, count)))
      after.append(iterator.get_state())
  joined = [
    jax.tree.map(lambda *rows: np.concatenate(rows), *batch)
    for batch in zip(*parts, strict=True)
  ]
  return joined, after


@pytest.mark.parametrize("packing", tiny.PACKINGS)
def test_other_processes_go_on_with_the_same_batches(
  packing, tokenizer, tmp_path
):
  mixed = (
    dataclasses.replace(tiny.numbered(tmp_path, "a", 11), weight=0.7),
    dataclasses.replace(tiny.numbered(tmp_path, "b", 17), weight=0.3),
  )
  plan = tiny.config(
    mixed, **{**tiny.PACKINGS[packing], "batch_size": 8, "streams": 4}
  )
  whole, _ = together(plan, tokenizer, 1, 15)
  states, done = None, 0
  for processes in (2, 1, 4, 1, 2):
    batches, states = together(plan, tokenizer, processes, 3, states)
    tiny.assert_equal(batches, whole[done : done + 3])
    done += 3
  # With no number given it is that of the processes at the beginning.
  free = dataclasses.replace(plan, streams=None)
  whole, _ = together(free, tokenizer, 4, 6)
  _, states = together(free, tokenizer, 4, 3)
  batches, states = together(free, tokenizer, 1, 2, states)
  tiny.assert_equal(batches, whole[3:5])
  batches, _ = together(free, tokenizer, 2, 1, states)
  tiny.assert_equal(batches, whole[5:])


def test_streams_that_cannot_be_shared_are_refused(tokenizer, tmp_path):
  plan = tiny.config(tiny.numbered(tmp_path), batch_size=6, streams=2)
  _, states = together(plan, tokenizer, 1, 1)
  with pytest.raises(ValueError, match=r"data\.streams=2 is not a multiple"):
    together(plan, tokenizer, 3, 1)
  for streams, processes, message in (
    (3, 1, "saved with streams=2, this run has 3"),
    (None, 3, "2 streams, which process_count=3 cannot share"),
  ):
    other = dataclasses.replace(plan, streams=streams)
    with pytest.raises(ValueError, match=message):
      together(other, tokenizer, processes, 1, states)
  for streams in (0, 4):
    with pytest.raises(ValueError, match=rf"data\.streams={streams} must be"):
      dataclasses.replace(plan, streams=streams)


def test_a_finite_pass_in_streams_gives_every_document_once(
  tokenizer, tmp_path
):
  plan = tiny.config(
    tiny.numbered(tmp_path),
    num_epochs=1,
    **{**tiny.PACKINGS["first_fit"], "batch_size": 4},
  )
  want = sorted(tiny.segments(tiny.read(plan, tokenizer)))
  dealt = dataclasses.replace(plan, streams=4)
  whole = goes_on_at_every_point(dealt, tokenizer)
  assert sorted(tiny.segments(whole)) == want
