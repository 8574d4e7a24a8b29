"""Small JSONL sources and what to do with a pipeline of them."""

import itertools
import json

import jax
import numpy as np

from dsv32_jax.data import pipeline
from dsv32_jax.data.pipeline import DataConfig
from dsv32_jax.data.sources import SourceConfig

PACKINGS = {
  "concat": {},
  "first_fit": {
    "packing": "first_fit",
    "packing_bins": 3,
    "sequence_length": 40,
  },
}


def jsonl(folder, name, rows):
  path = folder / f"{name}.jsonl"
  path.write_text("\n".join(json.dumps(row) for row in rows))
  return SourceConfig(kind="jsonl", path=str(path))


def texts(folder, name, values):
  return jsonl(folder, name, [{"text": value} for value in values])


def numbered(folder, name="n", count=23):
  """A source of documents of differing lengths that tell themselves apart."""
  return texts(
    folder, name, [f"{name}{i} " + "fox " * (i % 7) for i in range(count)]
  )


def config(source, **changes):
  changes = {"sequence_length": 16, "batch_size": 2, **changes}
  sources = source if isinstance(source, tuple) else (source,)
  return DataConfig(sources=sources, **changes)


def read(settings, tokenizer, count=None, **shard):
  with pipeline.make_batches(settings, tokenizer, **shard) as iterator:
    return list(itertools.islice(iterator, count))


def assert_equal(left, right):
  assert len(left) == len(right)
  for x, y in zip(left, right):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def segments(batch_list):
  """Yields the token ids of every segment, in order."""
  for batch in batch_list:
    for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT):
      for number in range(1, segments_T.max(initial=0) + 1):
        yield tokens_T[segments_T == number].tolist()


def check_invariants(batch):
  segments_BT, positions_BT = batch.segments_BT, batch.positions_BT
  for row in range(len(segments_BT)):
    runs = [
      (number, len(list(group)))
      for number, group in itertools.groupby(segments_BT[row])
    ]
    numbers = [number for number, _ in runs if number]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(number for number, _ in runs[:-1]), "padding at the end only"
    want = [np.arange(n) if number else np.zeros(n) for number, n in runs]
    np.testing.assert_array_equal(positions_BT[row], np.concatenate(want))
  same = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
  np.testing.assert_array_equal(
    batch.targets_BT[:, :-1], np.where(same, batch.tokens_BT[:, 1:], 0)
  )
  assert not batch.loss_mask_BT[:, :-1][~same].any()
  assert not batch.loss_mask_BT[:, -1].any()
