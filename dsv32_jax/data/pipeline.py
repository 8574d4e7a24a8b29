"""The grain pipeline: shuffle, tokenise, pack, mix, batch, resume.

Each source is shuffled anew every epoch, dealt out to streams, encoded and
packed into rows of its own; the rows of the sources are then mixed by weight,
so a weight is a share of the tokens. Every stage is deterministic and its state
is a few numbers: a pipeline that is restored goes on exactly where the saved
one stood, whatever the number of reader threads.
"""

from collections.abc import Callable
import dataclasses

import grain

from dsv32_jax.data import batch_iterator
from dsv32_jax.data import documents
from dsv32_jax.data import mixture
from dsv32_jax.data import packing
from dsv32_jax.data import records
from dsv32_jax.data import sources
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.data.bad_records import BadRecords

_STATE_FORMAT = 2
_READ_AHEAD = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What to train or evaluate on.

  Attributes:
    sources: the mixture.
    sequence_length: tokens a row.
    batch_size: rows a step, over all processes.
    streams: shares that the data are dealt out to, each with as many rows of a
      batch; a run goes on in any number of processes that divides them. None:
      one a process, or as many as a run that goes on has had.
    packing: "concat" (documents follow one another and are cut at a row's end:
      no padding) or "first_fit" (documents stay whole, one longer than a row
      is a bad record).
    seed: of the shuffle; None keeps the order of the files.
    num_epochs: passes over the data; None never ends. A finite number takes
      one source, and its last batch is filled up with padding.
    num_workers: threads a stream that read ahead, for slow storage; encoding
      itself gains nothing from them. The data do not depend on the number.
    max_bad_records: malformed records tolerated, over all sources.
    packing_bins: rows that first-fit fills at a time.
    cache_bytes: memory a source may use for documents already encoded.
    tokenizer: where the tokenizer comes from.
  """

  sources: tuple[sources.SourceConfig, ...]
  sequence_length: int
  batch_size: int
  streams: int | None = None
  packing: str = "concat"
  seed: int | None = 0
  num_epochs: int | None = None
  num_workers: int = 0
  max_bad_records: int = 0
  packing_bins: int = 32
  cache_bytes: int = 2**29
  tokenizer: tokenizers.TokenizerConfig = dataclasses.field(
    default_factory=tokenizers.TokenizerConfig
  )

  def __post_init__(self):
    if not self.sources:
      raise ValueError("data.sources is empty")
    for name in ("sequence_length", "batch_size", "packing_bins"):
      if getattr(self, name) < 1:
        raise ValueError(f"data.{name}={getattr(self, name)} must be positive")
    if self.streams is not None and (
      self.streams < 1 or self.batch_size % self.streams
    ):
      raise ValueError(
        f"data.streams={self.streams} must be positive and divide"
        f" data.batch_size={self.batch_size}"
      )
    for name in ("num_workers", "max_bad_records", "cache_bytes"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"data.{name}={getattr(self, name)} must not be negative"
        )
    if self.packing not in _PACK:
      raise ValueError(f"data.packing={self.packing!r} none of {list(_PACK)}")
    if self.seed is not None and not 0 <= self.seed < 2**32:
      raise ValueError(f"data.seed={self.seed} is not in 0 .. 2**32 - 1")
    if self.num_epochs is not None:
      if self.num_epochs < 1:
        raise ValueError(f"data.num_epochs={self.num_epochs} must be positive")
      if len(self.sources) > 1:
        raise ValueError(
          f"data.num_epochs={self.num_epochs} with {len(self.sources)} sources:"
          " a finite pass takes one"
        )

  @property
  def max_document_length(self) -> int | None:
    """Returns how many tokens a document may have; None for any number."""
    return self.sequence_length if self.packing == "first_fit" else None


def make_tokenizer(config: DataConfig) -> tokenizers.Tokenizer:
  """Loads the configured tokenizer, or trains one on the sources.

  Args:
    config: each source gives its share of `tokenizer.sample_bytes` by weight.

  Raises:
    ValueError: the file is no tokenizer, or a source is unusable.
  """
  if config.tokenizer.path is not None:
    return tokenizers.load(config.tokenizer.path)
  bad_records = BadRecords(config.max_bad_records)
  weight = sum(source.weight for source in config.sources)
  texts = []
  for source_config in config.sources:
    share = config.tokenizer.sample_bytes * source_config.weight / weight
    source = sources.open_source(source_config, bad_records)
    texts.extend(sources.sample_texts(source, int(share)))
  return tokenizers.train(texts, config.tokenizer.vocab_size)


def make_batches(
  config: DataConfig,
  tokenizer: tokenizers.Tokenizer,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> batch_iterator.BatchIterator:
  """Opens the sources and returns this process's batches.

  Args:
    config: what to read and how.
    tokenizer: encodes the documents.
    process_index: which share of the data this process takes; several take
      the same one where a mesh cuts rows across them.
    process_count: number of shares; divides the streams.

  Returns:
    An iterator of batches of batch_size / process_count rows. Close it, or
    use it in a with statement.

  Raises:
    ValueError: a source is unusable or has fewer records than streams, the
      streams do not divide the batch or the processes not the streams.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(f"{process_index=} is not below {process_count=}")
  bad_records = BadRecords(config.max_bad_records)
  opened = [sources.open_source(x, bad_records) for x in config.sources]
  tokenized = [
    documents.TokenizedDocuments(
      source,
      source_config,
      tokenizer,
      bad_records,
      max_length=config.max_document_length,
      cache_bytes=config.cache_bytes,
    )
    for source, source_config in zip(opened, config.sources)
  ]

  def open_stream(stream: int, num_streams: int) -> grain.IterDataset:
    rows = [
      _PACK[config.packing](
        _share(one, config, number, stream, num_streams), config
      )
      for number, one in enumerate(tokenized)
    ]
    mixed = mixture.MixedRows(rows, [x.weight for x in config.sources])
    return mixed.batch(config.batch_size // num_streams, drop_remainder=False)

  manifest = {
    "format": _STATE_FORMAT,
    "tokenizer": tokenizer.fingerprint,
    "sources": [source.identity for source in opened],
    "settings": _settings(config),
  }
  return batch_iterator.BatchIterator(
    open_stream,
    bad_records,
    manifest,
    batch_size=config.batch_size,
    streams=config.streams,
    process_index=process_index,
    process_count=process_count,
  )


def _settings(config: DataConfig) -> dict:
  """Returns what the order and form of the data depend on."""
  return {
    "sequence_length": config.sequence_length,
    "batch_size": config.batch_size,
    "packing": config.packing,
    "seed": config.seed,
    "num_epochs": config.num_epochs,
    "packing_bins": config.packing_bins,
    "weights": [source.weight for source in config.sources],
    "fields": [list(source.fields) for source in config.sources],
    "kinds": [source.kind for source in config.sources],
  }


def _share(
  tokenized: documents.TokenizedDocuments,
  config: DataConfig,
  number: int,
  stream: int,
  num_streams: int,
) -> grain.IterDataset:
  """Shuffles a source and deals every stream its share, epoch by epoch."""
  if len(tokenized) < num_streams:
    raise ValueError(
      f"source path={config.sources[number].path!r} has {len(tokenized)}"
      f" records for {num_streams} streams"
    )
  dataset = grain.MapDataset.source(tokenized)
  if config.seed is not None:
    seed = int(records.identity([(config.seed, number)])[:8], 16)
    dataset = dataset.shuffle(seed=seed)
  dataset = dataset[stream::num_streams]
  dataset = dataset.repeat(config.num_epochs)
  threads = config.num_workers
  return dataset.to_iter_dataset(
    grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=threads * _READ_AHEAD
    )
  )


def _concat(dataset: grain.IterDataset, config: DataConfig):
  return packing.Concatenated(dataset, sequence_length=config.sequence_length)


def _first_fit(dataset: grain.IterDataset, config: DataConfig):
  return packing.FirstFit(
    dataset,
    sequence_length=config.sequence_length,
    num_bins=config.packing_bins,
  )


_PACK: dict[str, Callable[[grain.IterDataset, DataConfig], object]] = {
  "concat": _concat,
  "first_fit": _first_fit,
}
