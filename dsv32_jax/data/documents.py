"""Records to token arrays, remembered while memory lasts.

Axes: L tokens of a document; 2 token id, and 1 if it is to be learnt else 0.
"""

import threading

import numpy as np

from dsv32_jax.data import pieces
from dsv32_jax.data.bad_records import BadRecords
from dsv32_jax.data.sources import Source
from dsv32_jax.data.sources import SourceConfig
from dsv32_jax.data.tokenizer import Tokenizer


def text_parts(record, config: SourceConfig, tokenizer: Tokenizer):
  """Yields (part, learnt) of a document to continue: bos, text, eos."""
  yield tokenizer.bos_id, True
  yield record[config.text_field], True
  yield tokenizer.eos_id, True


def exchange_parts(record, config: SourceConfig, tokenizer: Tokenizer):
  """Yields (part, learnt) of a question and its answer.

  The layout is that of DeepSeek-V3.2's chat encoding without thinking: bos,
  user, prompt, assistant, end of thinking, response, eos. The response and the
  eos are learnt.
  """
  yield tokenizer.bos_id, False
  yield tokenizer.special_id("user"), False
  yield record[config.prompt_field], False
  yield tokenizer.special_id("assistant"), False
  yield tokenizer.special_id("think_end"), False
  yield record[config.response_field], True
  yield tokenizer.eos_id, True


def conversation_parts(record, config: SourceConfig, tokenizer: Tokenizer):
  """Yields (part, learnt) of a conversation; see `pieces`."""
  yield from pieces.read(record[config.pieces_field], tokenizer)


class TokenizedDocuments:
  """A source's records as arrays of ids and learning marks.

  What users wrote is encoded as plain text; special tokens come from the
  layout alone.
  """

  def __init__(
    self,
    source: Source,
    config: SourceConfig,
    tokenizer: Tokenizer,
    bad_records: BadRecords,
    *,
    max_length: int | None,
    cache_bytes: int,
  ):
    """Wraps a source.

    Args:
      source: records.
      config: of that source.
      tokenizer: encodes them.
      bad_records: takes documents above max_length.
      max_length: tokens a document may have; None for any number.
      cache_bytes: memory for documents already encoded.
    """
    self._source = source
    self._config = config
    self._tokenizer = tokenizer
    self._bad_records = bad_records
    self._max_length = max_length
    if config.pieces_field:
      self._parts = conversation_parts
    else:
      self._parts = exchange_parts if config.prompt_field else text_parts
    self._cache: dict[int, np.ndarray] = {}
    self._cache_bytes_left = cache_bytes
    self._faults: set[int] = set()
    self._lock = threading.Lock()

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index: int) -> np.ndarray | None:
    """Returns int32 [L, 2], or None for a bad record.

    Raises:
      ValueError: more bad records than the budget allows, or only bad ones.
    """
    index = int(index)
    if index in self._cache:
      return self._cache[index]
    if index in self._faults:
      return None
    document_L2 = self._encode(index)
    with self._lock:
      if document_L2 is None:
        self._faults.add(index)
        if len(self._faults) == len(self):
          raise ValueError(
            f"source kind={self._config.kind!r} path={self._config.path!r} has"
            " no usable record"
          )
      elif document_L2.nbytes <= self._cache_bytes_left:
        self._cache[index] = document_L2
        self._cache_bytes_left -= document_L2.nbytes
    return document_L2

  def _encode(self, index: int) -> np.ndarray | None:
    record = self._source[index]
    if record is None:
      return None
    token_ids, learnt = [], []
    try:
      for part, learn in self._parts(record, self._config, self._tokenizer):
        ids = self._tokenizer.encode_parts([part])
        token_ids.extend(ids)
        learnt.extend([learn] * len(ids))
    except ValueError as error:  # pieces that are none
      self._bad_records.add(*self._source.place(index), str(error))
      return None
    length = len(token_ids)
    if self._max_length is not None and length > self._max_length:
      file, place = self._source.place(index)
      self._bad_records.add(
        file, place, f"{length} tokens are above {self._max_length}"
      )
      return None
    return np.stack([token_ids, learnt], axis=1).astype(np.int32)
