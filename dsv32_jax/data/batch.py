"""The one typed batch that every part of the project uses.

Axes: B batch, T sequence.
"""

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Packed token sequences with what a loss and an attention mask need.

  A row holds several documents one after another, then padding. All arrays
  are numpy arrays from the pipeline, jax arrays inside a jitted function.

  Attributes:
    tokens_BT: int32 token ids; 0 in padding.
    targets_BT: int32, the next token of the same segment; 0 where there is
      none (the last token of a segment, and padding).
    loss_mask_BT: float32, 1.0 where the target exists and is to be learnt,
      else 0.0.
    segments_BT: int32, 1, 2, ... by document within the row; 0 in padding.
    positions_BT: int32, the position within the segment, from 0; 0 in padding.
  """

  tokens_BT: np.ndarray | jax.Array
  targets_BT: np.ndarray | jax.Array
  loss_mask_BT: np.ndarray | jax.Array
  segments_BT: np.ndarray | jax.Array
  positions_BT: np.ndarray | jax.Array


def from_packed(tokens_BT, learn_BT, segments_BT, positions_BT) -> Batch:
  """Derives targets and loss mask of packed rows.

  Args:
    tokens_BT: integers [B, T], packed token ids.
    learn_BT: integers or bool [B, T], non-zero where a token, seen as a
      target, is to be learnt.
    segments_BT: integers [B, T], 0 in padding; a segment is contiguous.
    positions_BT: integers [B, T].

  Returns:
    The batch, in numpy arrays.

  Raises:
    ValueError: the arrays are not all of one shape [B, T].
  """
  tokens_BT = np.asarray(tokens_BT, np.int32)
  learn_BT = np.asarray(learn_BT, np.bool_)
  segments_BT = np.asarray(segments_BT, np.int32)
  positions_BT = np.asarray(positions_BT, np.int32)
  shapes = [x.shape for x in (tokens_BT, learn_BT, segments_BT, positions_BT)]
  if tokens_BT.ndim != 2 or len(set(shapes)) != 1:
    raise ValueError(f"{shapes=} must be one and the same [B, T]")
  has_target_BT = np.zeros(tokens_BT.shape, np.bool_)
  has_target_BT[:, :-1] = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (
    segments_BT[:, :-1] > 0
  )
  next_BT = np.zeros_like(tokens_BT)
  next_BT[:, :-1] = tokens_BT[:, 1:]
  learn_next_BT = np.zeros_like(learn_BT)
  learn_next_BT[:, :-1] = learn_BT[:, 1:]
  return Batch(
    tokens_BT=np.where(segments_BT > 0, tokens_BT, 0),
    targets_BT=np.where(has_target_BT, next_BT, 0),
    loss_mask_BT=(has_target_BT & learn_next_BT).astype(np.float32),
    segments_BT=segments_BT,
    positions_BT=np.where(segments_BT > 0, positions_BT, 0),
  )


def padding(batch_size: int, sequence_length: int) -> Batch:
  """Returns a batch of padding only: no token, no target, no loss.

  Several processes that evaluate a finite data set can run out at different
  steps; the early ones go on with this.

  Args:
    batch_size: number of rows.
    sequence_length: tokens a row.
  """
  empty_BT = np.zeros((batch_size, sequence_length), np.int32)
  return from_packed(empty_BT, empty_BT, empty_BT, empty_BT)


def from_documents(documents, sequence_length: int) -> Batch:
  """Puts each document into a row of its own, padded at the end.

  Args:
    documents: sequences of token ids, one a row.
    sequence_length: tokens a row.

  Returns:
    A batch of len(documents) rows, every target learnt.

  Raises:
    ValueError: a document is longer than a row.
  """
  tokens_BT = np.zeros((len(documents), sequence_length), np.int32)
  segments_BT = np.zeros_like(tokens_BT)
  for row, document in enumerate(documents):
    length = len(document)
    if length > sequence_length:
      raise ValueError(f"{row=} has {length=} above {sequence_length=}")
    tokens_BT[row, :length] = document
    segments_BT[row, :length] = 1
  positions_BT = np.broadcast_to(
    np.arange(sequence_length, dtype=np.int32), tokens_BT.shape
  )
  return from_packed(tokens_BT, segments_BT, segments_BT, positions_BT)
