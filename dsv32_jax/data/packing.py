"""Documents into rows of fixed length, with state of a few numbers.

Both packers take int32 [L, 2] documents (token id, and 1 if it is to be learnt
else 0) and give rows as dicts of `row` [T, 2], `segments` [T] (1, 2, ... by
document, 0 in padding) and `positions` [T] (from 0 in each segment). Their
states survive JSON, and restoring reads again at most the documents of the row
or group in progress. (The packers in grain.experimental 0.2.18 do not serve:
the state of concat-then-split compares tuples, which JSON turns into lists, and
then goes on with other data.)

Axes: L tokens of a document or piece, T sequence; 2 as above.
"""

import grain
import numpy as np


def make_row(pieces, sequence_length: int) -> dict[str, np.ndarray]:
  """Lays pieces one after another and pads the rest.

  Args:
    pieces: int32 [L, 2] each, together no longer than the row.
    sequence_length: T.
  """
  row_T2 = np.zeros((sequence_length, 2), np.int32)
  segments_T = np.zeros(sequence_length, np.int32)
  positions_T = np.zeros(sequence_length, np.int32)
  start = 0
  for number, piece_L2 in enumerate(pieces, 1):
    end = start + len(piece_L2)
    row_T2[start:end] = piece_L2
    segments_T[start:end] = number
    positions_T[start:end] = np.arange(end - start)
    start = end
  return {"row": row_T2, "segments": segments_T, "positions": positions_T}


class Concatenated(grain.IterDataset):
  """Rows cut from the documents laid end to end; only the last has padding.

  A document that a row's end cuts goes on as a segment of its own in the next.
  """

  def __init__(self, parent: grain.IterDataset, *, sequence_length: int):
    super().__init__(parent)
    self._sequence_length = sequence_length

  def __iter__(self):
    return _ConcatenatedIterator(iter(self._parent), self._sequence_length)


class _ConcatenatedIterator(grain.DatasetIterator):
  """State: the parent's before the document in progress, and tokens used."""

  def __init__(self, parent: grain.DatasetIterator, sequence_length: int):
    super().__init__(parent)
    self._sequence_length = sequence_length
    self._document_L2 = None
    self._parent_state = None
    self._offset = 0

  def _take(self, room: int) -> np.ndarray:
    """Returns the next piece, at most `room` long."""
    if self._document_L2 is None:
      parent_state = self._parent.get_state()
      self._document_L2 = next(self._parent)
      self._parent_state, self._offset = parent_state, 0
    piece_L2 = self._document_L2[self._offset : self._offset + room]
    self._offset += len(piece_L2)
    if self._offset == len(self._document_L2):
      self._document_L2 = None
    return piece_L2

  def __next__(self):
    pieces = []
    room = self._sequence_length
    while room:
      try:
        pieces.append(self._take(room))
      except StopIteration:
        if not pieces:
          raise
        break
      room -= len(pieces[-1])
    return make_row(pieces, self._sequence_length)

  def get_state(self):
    if self._document_L2 is None:
      return {"parent": self._parent.get_state(), "offset": 0}
    return {"parent": self._parent_state, "offset": self._offset}

  def set_state(self, state):
    self._parent.set_state(state["parent"])
    self._document_L2, self._offset = None, 0
    if state["offset"]:
      self._parent_state = state["parent"]
      self._document_L2 = next(self._parent)
      self._offset = state["offset"]


class FirstFit(grain.IterDataset):
  """Rows of whole documents, each in the first row that has room for it.

  Up to `num_bins` rows are open. A document that fits none of them closes them
  all, and opens the next group. No document may be longer than a row.
  """

  def __init__(
    self, parent: grain.IterDataset, *, sequence_length: int, num_bins: int
  ):
    super().__init__(parent)
    self._sequence_length = sequence_length
    self._num_bins = num_bins

  def __iter__(self):
    return _FirstFitIterator(
      iter(self._parent), self._sequence_length, self._num_bins
    )


class _FirstFitIterator(grain.DatasetIterator):
  """State: the parent's before the group, and the rows of it given out."""

  def __init__(
    self, parent: grain.DatasetIterator, sequence_length: int, num_bins: int
  ):
    super().__init__(parent)
    self._sequence_length = sequence_length
    self._num_bins = num_bins
    self._restart(parent.get_state())

  def _restart(self, parent_state):
    self._group_state = self._next_group_state = parent_state
    self._group: list[list[np.ndarray]] = []
    self._num_given = 0
    # The document that closed the last group, and is first in the next.
    self._waiting_L2 = None

  def _fill_group(self):
    """Reads the documents of the next group; none left leaves it empty."""
    self._group_state = self._next_group_state
    self._group, self._num_given = [], 0
    room = []
    while True:
      state_before = self._parent.get_state()
      if self._waiting_L2 is not None:
        document_L2, self._waiting_L2 = self._waiting_L2, None
      else:
        try:
          document_L2 = next(self._parent)
        except StopIteration:
          self._next_group_state = state_before
          return
      length = len(document_L2)
      assert length <= self._sequence_length
      fitting = (i for i, left in enumerate(room) if left >= length)
      place = next(fitting, len(room))
      if place == self._num_bins:
        self._waiting_L2 = document_L2
        self._next_group_state = state_before
        return
      if place == len(room):
        room.append(self._sequence_length)
        self._group.append([])
      room[place] -= length
      self._group[place].append(document_L2)

  def __next__(self):
    if self._num_given == len(self._group):
      self._fill_group()
      if not self._group:
        raise StopIteration
    pieces = self._group[self._num_given]
    self._num_given += 1
    return make_row(pieces, self._sequence_length)

  def get_state(self):
    return {"parent": self._group_state, "given": self._num_given}

  def set_state(self, state):
    self._parent.set_state(state["parent"])
    self._restart(state["parent"])
    if state["given"]:
      self._fill_group()
      self._num_given = state["given"]
