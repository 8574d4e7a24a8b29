"""Seconds a decoded token takes, by how many tokens the cache holds."""

from collections.abc import Sequence
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.generation import sample

# B batch, T tokens


def time_per_token(
  decoder: sample.Decoder,
  positions: Sequence[int],
  *,
  num_tokens: int,
  progress=lambda steps: steps,
) -> list[float]:
  """Times single tokens behind full caches.

  Each position has a cache of its own size, full but for the tokens timed. Its
  content is random numbers of unit size, as the normed latents are: what is
  held does not change the work.

  Args:
    decoder: of the model.
    positions: tokens in context, one measurement each.
    num_tokens: tokens timed a position, after as many to warm up.
    progress: wraps the iterable of positions.

  Returns:
    The median seconds a token at each position.

  Raises:
    ValueError: if a position holds no more than the tokens that are timed.
  """
  medians = []
  for position in progress(positions):
    if position <= 2 * num_tokens:
      raise ValueError(f"{position=} must exceed 2 * {num_tokens=}")
    cache = full_cache(decoder, position, position - 2 * num_tokens)
    token_BT = jnp.zeros((1, 1), jnp.int32)
    seconds = []
    for _ in range(2 * num_tokens):
      start = time.perf_counter()
      logits_BV, cache = decoder(token_BT, cache)
      jax.block_until_ready(logits_BV)
      seconds.append(time.perf_counter() - start)
    medians.append(float(np.median(seconds[num_tokens:])))
  return medians


def full_cache(decoder: sample.Decoder, capacity: int, length: int):
  """A cache of random content that says it holds `length` tokens.

  Args:
    decoder: of the model.
    capacity: slots.
    length: of them that count as held.
  """
  generator = np.random.default_rng(0)
  empty = decoder.empty_cache(1, capacity)
  filled = jax.tree.map(
    lambda x: jnp.asarray(generator.standard_normal(x.shape), x.dtype),
    (empty.dense, empty.moe),
  )
  full = empty._replace(
    dense=filled[0], moe=filled[1], length_B=jnp.full((1,), length, jnp.int32)
  )
  return decoder.place(full)
