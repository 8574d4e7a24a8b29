"""The compiled side of the engine: weights, pages and one step of both.

Two shapes of one program serve everything: a token of each of `max_batch`
sequences, and `prefill_chunk` tokens of one; both for some numbers of pages.
Where the model's weights lie on a mesh, its devices share the work by the rules
of sharding.py, and each holds its part of the pages.
"""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.generation import sampler
from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import selection
from dsv32_jax.model import transformer

# B sequences, T tokens, M pages of a sequence, L layers, A experts a token,
# S selected keys

# Tokens below which a smaller page table would save little.
LEAST_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes of an engine; they decide what is compiled.

  Attributes:
    max_batch: sequences that run at once.
    page_size: tokens of a page of the cache.
    num_pages: pages of the cache; exactly one of this and the next is given.
    memory_budget_bytes: memory for the cache, on all devices together.
    prefill_chunk: prompt tokens a step, a multiple of page_size.
    max_length: tokens of prompt and answer together at most.
    page_counts: numbers of pages of a sequence that steps are compiled for;
      the largest holds max_length tokens. Default: doubled from those of
      LEAST_TOKENS on.
    index_key_format: "model" keeps index keys in the type of the activations;
      "fp8" in 8 bits with a scale, and scores as the official 8-bit indexer.
    seed: of the seeds of requests that bring none.
  """

  max_batch: int
  page_size: int = 64
  num_pages: int | None = None
  memory_budget_bytes: int | None = None
  prefill_chunk: int = 256
  max_length: int = 4096
  page_counts: tuple[int, ...] | None = None
  index_key_format: str = "model"
  seed: int = 0

  def __post_init__(self):
    for name in ("max_batch", "page_size", "prefill_chunk", "max_length"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    if self.prefill_chunk % self.page_size:
      raise ValueError(
        f"prefill_chunk={self.prefill_chunk} must be a multiple of"
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
        config, dtype=dtype, eight_bit_index=self.eight_bit_index
      )
      pages = self.memory_budget_bytes // (token * self.page_size)
    if pages < 1:
      raise ValueError(
        f"num_pages={self.num_pages}, memory_budget_bytes="
        f"{self.memory_budget_bytes}: the cache has no page"
      )
    return pages


class Call(NamedTuple):
  """What one step runs on.

  Attributes:
    tokens_BT: int32 tokens to run.
    length_B: int32 tokens that each sequence has in the cache.
    count_B: int32 how many of its tokens are real.
    table_BM: int32 pages of each sequence.
    rows: how to draw behind its last real token.
  """

  tokens_BT: np.ndarray
  length_B: np.ndarray
  count_B: np.ndarray
  table_BM: np.ndarray
  rows: sampler.Rows


class Result(NamedTuple):
  """What one step gives: a draw a row, and what the model chose."""

  drawn: sampler.Drawn
  experts_LBTA: jax.Array | None
  selection_LBTS: jax.Array


class Programs:
  """Holds weights and pages, and runs steps."""

  def __init__(self, model: transformer.Transformer, config: EngineConfig):
    """Takes the model's weights, and the mesh they lie on, if any."""
    self.model_config = model.config
    layout = jax.tree.leaves(nnx.state(model))[0].sharding
    is_on_mesh = isinstance(layout, jax.sharding.NamedSharding)
    self._mesh = layout.mesh if is_on_mesh else None
    self._graph, self._state = self._split(model)
    self.num_pages = config.pages_for(model.config, model.compute_dtype)
    pages = cache_lib.empty_pages(
      model.config,
      self.num_pages,
      config.page_size,
      dtype=model.compute_dtype,
      eight_bit_index=config.eight_bit_index,
    )
    # Arrays that no device was named for would compile the program again.
    results = None
    if self._mesh is not None:
      layout = jax.tree.map(
        lambda array: sharding.page_sharding(self._mesh, array.shape), pages
      )
      results = (layout, sharding.replicated(self._mesh))
    self._pages = jax.device_put(pages, layout)
    options = attention.AttentionOptions(
      select=selection.TopK(model.config.index_top_k),
      index_quantized=config.eight_bit_index,
    )
    run = functools.partial(_run, self._graph, options)
    # The old pages are given up, so that tokens are written in place.
    self._run = jax.jit(run, donate_argnums=1, out_shardings=results)

  def _split(self, model):
    """Unstacks the layers and lays each out as the rules of the mesh say."""
    graph, state = nnx.split(model.unstacked())
    if self._mesh is not None:
      state = jax.device_put(
        state, sharding.parameter_shardings(state, self._mesh)
      )
    return graph, state

  def load(self, model: transformer.Transformer) -> None:
    """Takes another model's weights; what is compiled serves on.

    Raises:
      ValueError: if that model has another shape.
    """
    graph, state = self._split(model)
    if graph != self._graph:
      raise ValueError("the model's shape is not that of the engine's model")
    self._state = state

  def fill(self, *, seed: int) -> None:
    """Writes random numbers of unit size to every page, to time steps."""
    generator = np.random.default_rng(seed)

    def fresh(array):
      values = generator.standard_normal(array.shape, np.float32)
      return jax.device_put(values.astype(array.dtype), array.sharding)

    self._pages = jax.tree.map(fresh, self._pages)

  def __call__(self, call: Call) -> Result:
    with contextlib.ExitStack() as stack:
      if self._mesh is not None:
        stack.enter_context(jax.set_mesh(self._mesh))
      self._pages, result = self._run(self._state, self._pages, call)
    return result


def _run(graph, options, state, pages, call):
  model = nnx.merge(graph, state)

  def paged(layers):
    made = tuple(
      cache_lib.PagedLayerCache(*arrays, call.table_BM, call.count_B)
      for arrays in layers
    )
    return made or None

  cache = cache_lib.Cache(*map(paged, pages), call.length_B)
  output = model(
    call.tokens_BT, cache=cache, options=options, with_logits=False, record=True
  )
  last_B11 = jnp.maximum(call.count_B - 1, 0)[:, None, None]
  hidden_B1D = jnp.take_along_axis(output.hidden, last_B11, axis=1)
  drawn = sampler.draw(model.head(hidden_B1D)[:, 0], call.rows)
  written = tuple(
    tuple(layer[:4] for layer in layers or ())
    for layers in (output.cache.dense, output.cache.moe)
  )
  experts_LBTA = None if output.moe is None else output.moe.experts_BTA
  if experts_LBTA is not None and model.config.num_experts <= 256:
    experts_LBTA = experts_LBTA.astype(jnp.uint8)
  return written, Result(drawn, experts_LBTA, output.gather("selection"))
