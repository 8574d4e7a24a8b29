"""The compiled side of the engine: weights, pages and one step of both.

Two shapes of one program serve everything: a token of each of `max_batch`
sequences, and a chunk of `prefill_chunk` tokens of prompts; both for some
numbers of pages.
Where the model's weights lie on a mesh, its devices share the work by the rules
of sharding.py, and each holds its part of the pages.
"""

import contextlib
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.generation import sampler
from dsv32_jax.generation import sizes
from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import selection
from dsv32_jax.model import transformer

# B sequences, T tokens, M pages of a sequence, L layers, A experts a token,
# S selected keys

EngineConfig = sizes.EngineConfig


class Call(NamedTuple):
  """What one step runs on.

  Attributes:
    tokens_BT: int32 tokens to run.
    next_BT: int32 token behind each, for the MTP module; -1: the one that is
      drawn there.
    length_B: int32 tokens that each sequence has in the cache.
    count_B: int32 how many of its tokens are real.
    table_BM: int32 pages of each sequence.
    rows: how to draw; without biases, none are added.
  """

  tokens_BT: np.ndarray
  next_BT: np.ndarray
  length_B: np.ndarray
  count_B: np.ndarray
  table_BM: np.ndarray
  rows: sampler.Rows


class Result(NamedTuple):
  """What one step gives.

  Attributes:
    drawn: with an axis of Y draws behind the one of sequences: of a chunk the
      token behind a row's last real one, else one behind each token.
    draft_B: int32 guess at the token behind the last one drawn, or None.
    experts_LBTA: routing of each token, or None.
    selection_LBTS: keys that each token attended to.
  """

  drawn: sampler.Drawn
  draft_B: jax.Array | None
  experts_LBTA: jax.Array | None
  selection_LBTS: jax.Array


class Programs:
  """Holds weights and pages, and runs steps."""

  def __init__(self, model: transformer.Transformer, config: EngineConfig):
    """Takes the model's weights, and the mesh they lie on, if any.

    Raises:
      ValueError: if the cache has no page, or there is nothing to draft with.
    """
    if config.speculate and model.mtp is None:
      raise ValueError(
        f"speculate={config.speculate}: the model's num_mtp_layers="
        f"{model.config.num_mtp_layers}"
      )
    self._speculate = config.speculate
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
      with_mtp=config.speculate,
    )
    # Arrays that no device was named for would compile the program again.
    results = None
    if self._mesh is not None:
      layout = jax.tree.map(
        lambda array: sharding.page_sharding(self._mesh, array.shape), pages
      )
      results = (layout, sharding.replicated(self._mesh))
    self._pages = jax.device_put(pages, layout)
    self._beside = layout if results is None else results[1]
    self.most_adjusted = min(config.most_adjusted, model.config.vocab_size)
    # By number of rows: where nothing is added, nothing need be sent.
    self._no_bias: dict[int, tuple[jax.Array, jax.Array]] = {}
    options = attention.AttentionOptions(
      select=selection.TopK(model.config.index_top_k),
      index_quantized=config.eight_bit_index,
    )
    leaves, structure = jax.tree.flatten(results)
    self._run = _compiled(self._graph, options, tuple(leaves), structure)

  def _split(self, model):
    """Unstacks the layers and lays each out as the rules of the mesh say."""
    model = model.unstacked()
    if not self._speculate:
      model.mtp = None
    graph, state = nnx.split(model)
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

  def __call__(self, call: Call, *, is_chunk: bool) -> Result:
    """Runs a step; `is_chunk` of a chunk of prompts."""
    rows = call.rows
    if rows.bias_BK is None:
      bias_id_BK, bias_BK = self._none_of(len(rows.top_B))
    else:
      bias_id_BK, bias_BK = jax.device_put(
        (rows.bias_id_BK, rows.bias_BK), self._beside
      )
    rows = rows._replace(bias_id_BK=bias_id_BK, bias_BK=bias_BK)
    call = call._replace(rows=rows)
    with contextlib.ExitStack() as stack:
      if self._mesh is not None:
        stack.enter_context(jax.set_mesh(self._mesh))
      self._pages, result = self._run(
        self._state, self._pages, call, is_chunk=is_chunk
      )
    return result

  def _none_of(self, rows: int):
    if rows not in self._no_bias:
      none = sampler.biases([{}] * rows, self.most_adjusted)
      self._no_bias[rows] = jax.device_put(none, self._beside)
    return self._no_bias[rows]


# Engines of one shape, made one after another, share what is compiled.
@functools.lru_cache(maxsize=8)
def _compiled(graph, options, result_leaves, result_structure):
  """The jitted step of a model's graph, with the layout of its results."""
  return jax.jit(
    functools.partial(_run, graph, options),
    # The old pages are given up, so that tokens are written in place.
    donate_argnums=1,
    out_shardings=jax.tree.unflatten(result_structure, result_leaves),
    static_argnames="is_chunk",
  )


def _run(graph, options, state, pages, call, *, is_chunk):
  model = nnx.merge(graph, state)
  dense, moe, mtp = (
    tuple(
      cache_lib.PagedLayerCache(*arrays, call.table_BM, call.count_B)
      for arrays in layers
    )
    for layers in pages
  )
  cache = cache_lib.Cache(dense or None, moe or None, call.length_B)
  output = model(
    call.tokens_BT, cache=cache, options=options, with_logits=False, record=True
  )
  last_B = jnp.maximum(call.count_B - 1, 0)
  place_BY = last_B[:, None]
  if not is_chunk:
    place_BY = jnp.arange(call.tokens_BT.shape[1])[None]
  drawn = _draw(model, output.hidden, place_BY, call.rows)
  draft_B = None
  if mtp:
    draft_B, *mtp = _draft(model, options, output.hidden, call, drawn, mtp[0])
  written = tuple(
    tuple(layer[:4] for layer in layers or ())
    for layers in (output.cache.dense, output.cache.moe, mtp)
  )
  experts_LBTA = None if output.moe is None else output.moe.experts_BTA
  if experts_LBTA is not None and model.config.num_experts <= 256:
    experts_LBTA = experts_LBTA.astype(jnp.uint8)
  chosen = output.gather("selection")
  return written, Result(drawn, draft_B, experts_LBTA, chosen)


def _draw(model, hidden_BTD, place_BY, rows):
  """Draws behind some of the tokens, one behind the other: Drawn of [B,Y]."""
  hidden_BYD = jnp.take_along_axis(hidden_BTD, place_BY[..., None], axis=1)
  batch, count, width = hidden_BYD.shape
  hidden_X1D = hidden_BYD.reshape(batch * count, 1, width)
  drawn = sampler.draw(
    model.head(hidden_X1D)[:, 0], sampler.in_turn(rows, count)
  )
  return jax.tree.map(
    lambda part: part.reshape(batch, count, *part.shape[1:]), drawn
  )


def _draft(model, options, hidden_BTD, call, drawn, held):
  """Guesses the token behind the last one drawn that stands.

  The guess is drawn from the module's distribution with the very noise that the
  model's own draw will use: the nearer the two distributions, the oftener both
  give the same token.

  Returns:
    draft_B, and the module's cache.
  """
  token_BY = drawn.token_B
  next_BT = jnp.where(call.next_BT < 0, token_BY, call.next_BT)
  hidden_BTD, held = model.predict_behind(
    hidden_BTD, next_BT, held, call.length_B, options
  )
  last_B = jnp.maximum(call.count_B - 1, 0)
  ahead_B = jnp.ones_like(last_B)
  if token_BY.shape[1] > 1:
    # The second draw stands if the first one is the draft that was run.
    stands_B = (call.count_B > 1) & (token_BY[:, 0] == call.tokens_BT[:, 1])
    last_B = stands_B.astype(jnp.int32)
    ahead_B = ahead_B + last_B
  rows = call.rows._replace(step_B=call.rows.step_B + ahead_B)
  guess = _draw(model, hidden_BTD, last_B[:, None], rows)
  return guess.token_B[:, 0], held
