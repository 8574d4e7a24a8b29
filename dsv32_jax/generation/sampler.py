"""Draws a token for each row of logits, and says what it could have drawn.

Rows have their own parameters and seeds, held in arrays: one compiled program
serves every mixture of them, and a row's draw does not depend on the others.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.generation import requests
from pallas_kernels import bitmask

# B rows, V vocabulary, W words of 32 tokens, K changed logits, U likeliest ones

# Stands for no token.
_NONE = np.iinfo(np.int32).max


class Rows(NamedTuple):
  """Parameters of B rows.

  Attributes:
    temperature_B: float32; 0 takes the most likely token.
    top_p_B: float32.
    top_k_B: int32; 0: all.
    min_p_B: float32.
    seed_B2: uint32 halves of the seed.
    step_B: int32 tokens that the request has drawn before.
    banned_BW: uint32 tokens that are never drawn, as bits.
    top_B: int32 likeliest tokens that are asked for.
    bias_id_BK: int32 tokens whose logits change, each once.
    bias_BK: float32, by how much; both None: nothing changes.
  """

  temperature_B: np.ndarray | jax.Array
  top_p_B: np.ndarray | jax.Array
  top_k_B: np.ndarray | jax.Array
  min_p_B: np.ndarray | jax.Array
  seed_B2: np.ndarray | jax.Array
  step_B: np.ndarray | jax.Array
  banned_BW: np.ndarray | jax.Array
  top_B: np.ndarray | jax.Array
  bias_id_BK: np.ndarray | jax.Array | None = None
  bias_BK: np.ndarray | jax.Array | None = None


class Drawn(NamedTuple):
  """What came out.

  Attributes:
    token_B: int32.
    logprob_B: float32, in the distribution drawn from.
    kept_BW: uint32 tokens that could have been drawn, as bits.
    top_id_BU: int32 likeliest tokens, where a row asks for some.
    top_logprob_BU: float32 of each; -inf: it could not have been drawn.
  """

  token_B: jax.Array
  logprob_B: jax.Array
  kept_BW: jax.Array
  top_id_BU: jax.Array
  top_logprob_BU: jax.Array


def rows(
  parameters: Sequence[requests.SamplingParameters | None],
  seeds: Sequence[int],
  steps: Sequence[int],
  vocab_size: int,
  allowed: Sequence[np.ndarray | None] | None = None,
) -> Rows:
  """Gathers parameters; None stands for a row that nobody reads.

  Args:
    parameters: of each row; penalties and biases are not in the result.
    seeds: of each row.
    steps: tokens that each has drawn.
    vocab_size: V.
    allowed: of each row the tokens that a Constraint allows, if any.
  """

  def column(name, dtype, default):
    values = [default if p is None else getattr(p, name) for p in parameters]
    return np.asarray(values, dtype)

  words = -(-vocab_size // 32)
  banned_BW = np.zeros((len(parameters), words), np.uint32)
  for row, one in enumerate(parameters):
    if one is not None and one.banned_ids:
      ids = np.asarray(one.banned_ids, np.int64)
      bits = np.uint32(1) << (ids % 32).astype(np.uint32)
      np.bitwise_or.at(banned_BW[row], ids // 32, bits)
  for row, allowed_W in enumerate(allowed or ()):
    if allowed_W is not None:
      banned_BW[row] = _ban_all_but(allowed_W, banned_BW[row])
  halves = [(seed & 0xFFFFFFFF, seed >> 32) for seed in seeds]
  return Rows(
    temperature_B=column("temperature", np.float32, 0.0),
    top_p_B=column("top_p", np.float32, 1.0),
    top_k_B=column("top_k", np.int32, 0),
    min_p_B=column("min_p", np.float32, 0.0),
    seed_B2=np.asarray(halves, np.uint32).reshape(-1, 2),
    step_B=np.asarray(steps, np.int32),
    banned_BW=banned_BW,
    top_B=column("top_logprobs", np.int32, 0),
  )


def _ban_all_but(allowed_W, banned_W):
  # A constraint may know fewer tokens than the model has.
  other_W = np.full_like(banned_W, 0xFFFFFFFF)
  other_W[: len(allowed_W)] = ~np.asarray(allowed_W, np.uint32)
  both_W = other_W | banned_W
  return other_W if np.all(both_W == 0xFFFFFFFF) else both_W


def biases(
  rows: Sequence[Mapping[int, float]], width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Lists changes of logits: bias_id_BK and bias_BK of `width` K."""
  bias_id_BK = np.full((len(rows), width), _NONE, np.int32)
  bias_BK = np.zeros((len(rows), width), np.float32)
  for row, changes in enumerate(rows):
    bias_id_BK[row, : len(changes)] = list(changes.keys())
    bias_BK[row, : len(changes)] = list(changes.values())
  return bias_id_BK, bias_BK


def in_turn(rows: Rows, count: int) -> Rows:
  """Repeats each row `count` times, for draws one behind the other."""
  repeated = jax.tree.map(lambda part: jnp.repeat(part, count, axis=0), rows)
  turn_X = jnp.tile(jnp.arange(count, dtype=jnp.int32), len(rows.step_B))
  return repeated._replace(step_B=repeated.step_B + turn_X)


def adjust(logits_BV, rows: Rows):
  """Adds biases, and penalties among them: float32 logits_BV."""
  logits_BV = logits_BV.astype(jnp.float32)
  if rows.bias_BK is None:
    return logits_BV

  def add(logits_BV):
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[row_B1, rows.bias_id_BK].add(rows.bias_BK, mode="drop")

  # Few ask for it, and K may be large.
  return jax.lax.cond(
    jnp.any(rows.bias_BK != 0), add, lambda logits: logits, logits_BV
  )


def truncate(logits_BV, rows: Rows):
  """Divides by the temperature and sets to -inf what may not be drawn.

  Equally likely tokens count as ordered by their number.

  Returns:
    float32 logits_BV. A row of temperature 0 keeps its likeliest token alone.
  """
  vocab_size = logits_BV.shape[-1]
  banned_BV = bitmask.unpack(rows.banned_BW, vocab_size)
  allowed_BV = jnp.where(banned_BV, -jnp.inf, adjust(logits_BV, rows))
  greedy_B = rows.temperature_B == 0
  divisor_B = jnp.where(greedy_B, 1.0, rows.temperature_B)
  scaled_BV = allowed_BV / divisor_B[:, None]
  top_k_B = jnp.where(rows.top_k_B == 0, vocab_size, rows.top_k_B)
  top_k_B = jnp.where(greedy_B, 1, top_k_B)

  def cut(scaled_BV):
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    place_V = jnp.arange(vocab_size)
    kept_BV = place_V < top_k_B[:, None]
    chance_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(chance_BV, axis=-1) - chance_BV
    # The likeliest stays, whatever rounding does to the sums.
    kept_BV &= (before_BV < rows.top_p_B[:, None]) | (place_V == 0)
    least_B1 = rows.min_p_B[:, None] * chance_BV[:, :1]
    kept_BV &= chance_BV >= least_B1
    # Back to the order of the vocabulary; a second sort would cost as much as
    # the first.
    kept_BV = jnp.put_along_axis(
      jnp.zeros_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False
    )
    return jnp.where(kept_BV, scaled_BV, -jnp.inf)

  cuts_B = (rows.top_p_B < 1) | (rows.min_p_B > 0) | (top_k_B < vocab_size)
  # A sort of the vocabulary costs more than the rest, and may be for nothing.
  cut_BV = jax.lax.cond(
    jnp.any(cuts_B & ~greedy_B), cut, lambda scaled: scaled, scaled_BV
  )
  likeliest_B1 = jnp.argmax(scaled_BV, axis=-1, keepdims=True)
  one_BV = jnp.where(
    jnp.arange(vocab_size) == likeliest_B1, scaled_BV, -jnp.inf
  )
  left_BV = jnp.where(cuts_B[:, None], cut_BV, scaled_BV)
  return jnp.where(greedy_B[:, None], one_BV, left_BV)


def draw(logits_BV, rows: Rows) -> Drawn:
  """Draws from what `truncate` leaves."""
  left_BV = truncate(logits_BV, rows)

  def noise(seed_2, step):
    key = jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])
    key = jax.random.fold_in(key, step)
    return jax.random.gumbel(key, left_BV.shape[1:], jnp.float32)

  # Inside the reduction a CPU would take its logarithms one by one.
  noise_BV = jax.lax.optimization_barrier(
    jax.vmap(noise)(rows.seed_B2, rows.step_B)
  )
  # The noise is finite: what was set to -inf stays so.
  token_B = jnp.argmax(left_BV + noise_BV, axis=-1).astype(jnp.int32)
  logprob_BV = jax.nn.log_softmax(left_BV, axis=-1)
  logprob_B = jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]
  kept_BW = bitmask.pack(left_BV > -jnp.inf)
  return Drawn(token_B, logprob_B, kept_BW, *_likeliest(logprob_BV, rows))


def _likeliest(logprob_BV, rows):
  """Finds the likeliest tokens, where a row asks for any: ids and logprobs."""
  count = min(requests.MOST_TOP_LOGPROBS, logprob_BV.shape[1])

  def find(logprob_BV):
    top_logprob_BU, top_id_BU = jax.lax.top_k(logprob_BV, count)
    return top_id_BU, top_logprob_BU

  def none(logprob_BV):
    shape = (logprob_BV.shape[0], count)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

  return jax.lax.cond(jnp.any(rows.top_B > 0), find, none, logprob_BV)


def kept_ids(bits_W: np.ndarray, vocab_size: int) -> np.ndarray:
  """Lists a kept set: sorted int32 ids."""
  bytes_X = np.asarray(bits_W, "<u4").view(np.uint8)
  bits_V = np.unpackbits(bytes_X, bitorder="little")[:vocab_size]
  return np.flatnonzero(bits_V).astype(np.int32)
