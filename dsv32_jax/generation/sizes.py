"""Sizes of an engine, and what follows from them."""

import dataclasses

from dsv32_jax.model import cache as cache_lib

# Tokens below which a smaller page table would save little.
LEAST_TOKENS = 1024
# Rows of a chunk, where nothing else is asked for. Each reads the index keys of
# its own sequence.
DEFAULT_ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes of an engine; they decide what is compiled.

  Attributes:
    max_batch: sequences that run at once.
    page_size: tokens of a page of the cache.
    num_pages: pages of the cache; exactly one of this and the next is given.
    memory_budget_bytes: memory for the cache, on all devices together.
    prefill_chunk: prompt tokens a step.
    prefill_rows: rows that they lie in, of one sequence each and of whole
      pages; None: DEFAULT_ROWS, or the most below that leave whole pages.
    max_length: tokens of prompt and answer together at most.
    page_counts: numbers of pages of a sequence that steps are compiled for;
      the largest holds max_length tokens. Default: doubled from those of
      LEAST_TOKENS on.
    speculate: draft a token with the model's multi-token prediction module and
      run it with the one before.
    index_key_format: "model" keeps index keys in the type of the activations;
      "fp8" in 8 bits with a scale, and scores as the official 8-bit indexer.
    most_adjusted: tokens of a request at most whose logits penalties and biases
      change.
    seed: of the seeds of requests that bring none.
  """

  max_batch: int
  page_size: int = 64
  num_pages: int | None = None
  memory_budget_bytes: int | None = None
  prefill_chunk: int = 256
  prefill_rows: int | None = None
  max_length: int = 4096
  page_counts: tuple[int, ...] | None = None
  speculate: bool = False
  index_key_format: str = "model"
  most_adjusted: int = 4096
  seed: int = 0

  def __post_init__(self):
    for name in (
      *("max_batch", "page_size", "prefill_chunk", "max_length"),
      "most_adjusted",
    ):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if self.prefill_chunk % self.page_size:
      raise ValueError(
        f"prefill_chunk={self.prefill_chunk} must be a multiple of"
        f" page_size={self.page_size}"
      )
    if self.rows < 1 or self.prefill_chunk % (self.rows * self.page_size):
      raise ValueError(
        f"prefill_rows={self.prefill_rows} must be positive and divide"
        f" prefill_chunk={self.prefill_chunk} into whole pages of"
        f" page_size={self.page_size}"
      )
    if (self.num_pages is None) == (self.memory_budget_bytes is None):
      raise ValueError(
        f"num_pages={self.num_pages} and memory_budget_bytes="
        f"{self.memory_budget_bytes}: exactly one must be given"
      )
    if self.index_key_format not in ("model", "fp8"):
      raise ValueError(
        f"index_key_format={self.index_key_format!r} is not 'model' or 'fp8'"
      )
    most = self.most_pages
    if self.page_counts is not None and (
      not self.page_counts
      or min(self.page_counts) < 1
      or max(self.page_counts) != most
    ):
      raise ValueError(
        f"page_counts={self.page_counts} must be positive and end with {most},"
        f" the pages of max_length={self.max_length} tokens"
      )

  @property
  def rows(self) -> int:
    """Rows of a chunk: `prefill_rows` or their default."""
    if self.prefill_rows is not None:
      return self.prefill_rows
    pages = self.prefill_chunk // self.page_size
    return max(n for n in range(1, DEFAULT_ROWS + 1) if pages % n == 0)

  @property
  def row_tokens(self) -> int:
    """Tokens of a row of a chunk."""
    return self.prefill_chunk // self.rows

  @property
  def most_pages(self) -> int:
    """Pages of the longest sequence."""
    return -(-self.max_length // self.page_size)

  @property
  def compiled_page_counts(self) -> tuple[int, ...]:
    """`page_counts` or their default, ascending."""
    if self.page_counts is not None:
      return tuple(sorted(set(self.page_counts)))
    counts, count = [], -(-LEAST_TOKENS // self.page_size)
    while count < self.most_pages:
      counts.append(count)
      count *= 2
    return (*counts, self.most_pages)

  @property
  def eight_bit_index(self) -> bool:
    return self.index_key_format == "fp8"

  def pages_for(self, config, dtype) -> int:
    """Pages of the cache of a model.

    Raises:
      ValueError: if the budget does not hold a page.
    """
    if self.num_pages is not None:
      pages = self.num_pages
    else:
      token = cache_lib.bytes_per_token(
        config,
        dtype=dtype,
        eight_bit_index=self.eight_bit_index,
        with_mtp=self.speculate,
      )
      pages = self.memory_budget_bytes // (token * self.page_size)
    if pages < 1:
      raise ValueError(
        f"num_pages={self.num_pages}, memory_budget_bytes="
        f"{self.memory_budget_bytes}: the cache has no page"
      )
    return pages
