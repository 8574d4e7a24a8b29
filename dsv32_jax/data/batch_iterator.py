"""Batches out of streams, and the position that a checkpoint keeps of them.

The data are dealt out to streams, each of which gives every batch the same
number of rows: the first stream the first rows, and so on. A process has
consecutive streams. So a batch depends on the number of streams alone, and a
run goes on with the same data in any number of processes that divides it.

Axes: B batch, T sequence; 2 token id, and 1 if it is to be learnt else 0.
"""

from collections.abc import Callable
import json

import grain
import numpy as np

from dsv32_jax.data import batch as batches
from dsv32_jax.data.bad_records import BadRecords

# Opens a stream by its number and the number of all.
OpenStream = Callable[[int, int], grain.IterDataset]


class BatchIterator:
  """Batches of one process, with a state that can be saved.

  Attributes:
    bad_records: what was malformed so far (`len`, `entries()`).
    num_streams: of all processes together.
  """

  def __init__(
    self,
    open_stream: OpenStream,
    bad_records: BadRecords,
    manifest: dict,
    *,
    batch_size: int,
    streams: int | None,
    process_index: int,
    process_count: int,
  ):
    """Opens this process's streams.

    Args:
      open_stream: gives a stream's datasets of packed rows, batched.
      bad_records: takes what is malformed.
      manifest: JSON-able; what the data depend on besides.
      batch_size: rows of all processes.
      streams: how many; None: one a process, or as many as a position that is
        gone to was saved with.
      process_index: which share this process takes.
      process_count: number of shares.

    Raises:
      ValueError: the streams do not divide the batch, or the processes not
        the streams.
    """
    self.bad_records = bad_records
    self._open_stream, self._manifest = open_stream, manifest
    self._batch_size, self._streams = batch_size, streams
    self._process = process_index, process_count
    self._num_batches = 0
    self._open(process_count if streams is None else streams)

  def _open(self, num_streams: int):
    index, count = self._process
    if num_streams % count:
      raise ValueError(
        f"data.streams={num_streams} is not a multiple of process_count={count}"
      )
    if self._batch_size % num_streams:
      raise ValueError(
        f"data.batch_size={self._batch_size} is not a multiple of the"
        f" {num_streams} streams of process_count={count}"
      )
    self.num_streams, mine = num_streams, num_streams // count
    self._iterators = [
      iter(self._open_stream(number, num_streams))
      for number in range(index * mine, (index + 1) * mine)
    ]

  def __iter__(self):
    return self

  def __next__(self) -> batches.Batch:
    given = [next(iterator, None) for iterator in self._iterators]
    present = [packed for packed in given if packed is not None]
    if not present:
      raise StopIteration
    self._num_batches += 1
    size = self._batch_size // self.num_streams
    # A stream at its end gives padding.
    nothing = {name: rows[:0] for name, rows in present[0].items()}
    row_BT2, segments_BT, positions_BT = (
      np.concatenate([_filled((x or nothing)[name], size) for x in given])
      for name in ("row", "segments", "positions")
    )
    return batches.from_packed(
      row_BT2[..., 0], row_BT2[..., 1], segments_BT, positions_BT
    )

  def get_state(self) -> bytes:
    """Returns this process's position as JSON, for a checkpoint."""
    return json.dumps(
      {
        "manifest": self._manifest,
        "num_streams": self.num_streams,
        "first": self._process[0] * len(self._iterators),
        "num_batches": self._num_batches,
        "bad_records": self.bad_records.entries(),
        "positions": [iterator.get_state() for iterator in self._iterators],
      },
      sort_keys=True,
    ).encode()

  def set_state(self, *states: bytes):
    """Goes to a saved position; the next batch is the one after it.

    Args:
      *states: of `get_state`, of every process that saved.

    Raises:
      ValueError: a state is garbled, or was saved with other data, tokenizer
        or settings, or with streams that these processes cannot share.
    """
    try:
      saved = [json.loads(state) for state in states]
      manifests = [dict(one["manifest"]) for one in saved]
      # Processes that take the same rows say the same.
      positions = {
        one["first"] + number: place
        for one in saved
        for number, place in enumerate(one["positions"])
      }
      num_batches, num_streams = (
        saved[0][name] for name in ("num_batches", "num_streams")
      )
      bad_records = [entry for one in saved for entry in one["bad_records"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
      raise ValueError(f"data state is garbled: {error!r}") from error
    for manifest in manifests:
      for key, ours in self._manifest.items():
        theirs = manifest.get(key)
        if theirs != ours:
          raise ValueError(_difference(key, theirs, ours))
    if sorted(positions) != list(range(num_streams)):
      raise ValueError(
        f"data state is garbled: positions {sorted(positions)} of {num_streams}"
      )
    self._follow(num_streams)
    first = self._process[0] * len(self._iterators)
    for number, iterator in enumerate(self._iterators, first):
      iterator.set_state(positions[number])
    self._num_batches = num_batches
    self.bad_records.restore(bad_records)

  def _follow(self, num_streams: int):
    """Opens as many streams as were saved."""
    if num_streams == self.num_streams:
      return
    count = self._process[1]
    if self._streams is not None:
      raise ValueError(_difference("streams", num_streams, self._streams))
    if num_streams % count:
      raise ValueError(
        f"data state was saved with {num_streams} streams, which"
        f" process_count={count} cannot share; begin a run with data.streams, a"
        " multiple of every number of processes that it may have"
      )
    self.close()
    self._open(num_streams)

  def close(self):
    """Stops reader threads; the iterator cannot be used afterwards."""
    for iterator in self._iterators:
      iterator.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


def _filled(rows, size: int) -> np.ndarray:
  """Pads to a number of rows."""
  return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _difference(key: str, theirs, ours) -> str:
  """Says which part of the manifest differs."""
  if isinstance(theirs, dict) and isinstance(ours, dict):
    names = sorted(theirs.keys() | ours.keys())
    changed = [x for x in names if theirs.get(x) != ours.get(x)]
    key = f"{key}.{changed[0]}"
    theirs, ours = theirs.get(changed[0]), ours.get(changed[0])
  return (
    f"data state was saved with {key}={theirs}, this run has {ours}: it would"
    " not go on with the same data"
  )
