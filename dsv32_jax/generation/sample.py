"""A small sampler: prefill the prompt, then decode token by token."""

from collections.abc import Sequence
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import transformer

# B batch, T tokens, V vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How a token is drawn.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_p: keeps the most likely tokens that hold this much probability, the
      one that crosses it included.
    seed: of the draws.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not self.temperature >= 0:
      raise ValueError(f"temperature={self.temperature} must not be negative")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def nucleus(logits_BV, top_p: float):
  """Sets to -inf what lies outside the top_p nucleus.

  Tokens as likely as the least likely one inside stay as well.
  """
  if top_p >= 1:
    return logits_BV
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
  least_B1 = jnp.min(
    jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
  )
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def draw(logits_BV, key, config: SamplingConfig):
  """Draws a token for each row: int32 token_B.

  Temperature comes first, then the nucleus.
  """
  if config.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  scaled_BV = logits_BV.astype(jnp.float32) / config.temperature
  kept_BV = nucleus(scaled_BV, config.top_p)
  return jax.random.categorical(key, kept_BV).astype(jnp.int32)


class Decoder:
  """A model with unstacked layers, ready to run behind a cache."""

  def __init__(
    self,
    model: transformer.Transformer,
    options: attention.AttentionOptions,
  ):
    """Copies the model's layers out of their stack.

    Args:
      model: with stacked layers.
      options: which keys a query sees.
    """
    self.config = model.config
    self._dtype = model.compute_dtype
    graph, self._state = nnx.split(model.unstacked())
    self._graph = graph

    # The old cache is given up, so that a token is written in place.
    @functools.partial(jax.jit, donate_argnums=2)
    def run(state, tokens_BT, cache):
      model = nnx.merge(graph, state)
      output = model(tokens_BT, cache=cache, options=options, with_logits=False)
      return model.head(output.hidden[:, -1:])[:, 0], output.cache

    self._run = run

  def load(self, model: transformer.Transformer) -> None:
    """Takes another model's weights; what is compiled serves on.

    Raises:
      ValueError: if that model has another shape.
    """
    graph, state = nnx.split(model.unstacked())
    if graph != self._graph:
      raise ValueError("the model's shape is not that of the decoder's model")
    self._state = state

  def empty_cache(self, batch: int, capacity: int) -> cache_lib.Cache:
    """A cache for `batch` sequences of at most `capacity` tokens."""
    cache = cache_lib.empty_cache(
      self.config, batch, capacity, dtype=self._dtype, stacked=False
    )
    return self.place(cache)

  def place(self, tree):
    """Puts arrays where the weights lie.

    Arrays that no device was named for would compile the same program again.
    """
    layout = jax.tree.leaves(self._state)[0].sharding
    if isinstance(layout, jax.sharding.NamedSharding):
      layout = sharding.replicated(layout.mesh)
    return jax.device_put(tree, layout)

  def __call__(self, tokens_BT, cache: cache_lib.Cache):
    """Appends tokens; the cache given is used up.

    Returns:
      logits_BV float32 after the last token, and the new cache.
    """
    return self._run(self._state, self.place(tokens_BT), cache)


def generate(
  decoder: Decoder,
  prompt_ids: Sequence[int],
  *,
  num_tokens: int,
  sampling: SamplingConfig,
  eos_id: int | None = None,
  capacity: int | None = None,
) -> list[int]:
  """Continues a prompt.

  Args:
    decoder: of the model.
    prompt_ids: at least one token.
    num_tokens: new tokens at most.
    sampling: how to draw them.
    eos_id: ends the text and is returned as its last token; None: no end.
    capacity: slots of the cache; default: what prompt and new tokens need. A
      fixed one saves compilations.

  Returns:
    The new tokens.

  Raises:
    ValueError: if the prompt is empty or does not fit.
  """
  needed = len(prompt_ids) + num_tokens
  capacity = needed if capacity is None else capacity
  if not len(prompt_ids) or num_tokens < 1:
    raise ValueError(f"{len(prompt_ids)=} and {num_tokens=} must be positive")
  if needed > capacity:
    raise ValueError(f"{needed=} tokens exceed the cache's {capacity=}")
  keys = jax.random.split(jax.random.key(sampling.seed), num_tokens)
  next_token = jax.jit(functools.partial(draw, config=sampling))
  cache = decoder.empty_cache(1, capacity)
  tokens_BT = jnp.asarray([list(prompt_ids)], jnp.int32)
  new_ids = []
  for key in keys:
    logits_BV, cache = decoder(tokens_BT, cache)
    token_B = next_token(logits_BV, key)
    new_ids.append(int(np.asarray(token_B)[0]))
    if new_ids[-1] == eos_id:
      break
    tokens_BT = token_B[:, None]
  return new_ids
