"""The KL's TPU kernels in the TPU interpreter, against the definition."""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# G key heads (H or 1), Q query width

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels import visibility
from pallas_kernels.indexer_kl import indexer_kl_loss

SCALE = 0.4


def draw_problem(shape, *, shared, mask, segments, seed=0):
  """Returns (trained, constants, options); shape is (T, S, I, K, H, Q)."""
  queries, keys, index_heads, index_width, heads, width = shape
  random = np.random.default_rng(seed)

  def draw(*shape):
    return random.normal(size=shape).astype(np.float32)

  trained = (
    draw(2, queries, index_heads, index_width) * 0.5,
    draw(2, keys, index_width) * 0.5,
    draw(2, queries, index_heads),
  )
  query = draw(2, queries, heads, width)
  key = draw(2, keys, 1 if shared else heads, width)
  slots = random.integers(-1, keys, (2, queries)).astype(np.int32)
  slots[0, 0] = -1
  options = {}
  if mask:
    chosen = random.random((2, queries, keys)) < 0.4
    # A stretch of keys that nobody selects: tiles that must be skipped.
    chosen[:, :, keys // 2 :] = False
    options["mask_BTW"] = np.asarray(bitmask.pack(jnp.asarray(chosen)))
  if segments:
    options["query_segments_BT"] = random.integers(0, 3, (2, queries))
    options["key_segments_BS"] = random.integers(0, 2, (2, keys))
  lse = log_sum_exp(query, key, slots, options)
  return trained, (query, key, lse, slots), options


def log_sum_exp(query, key, slots, options):
  keys = key.shape[1]
  visible = visibility.allowed(
    slots,
    keys,
    options.get("query_segments_BT"),
    options.get("key_segments_BS"),
  )
  if "mask_BTW" in options:
    visible &= bitmask.unpack(options["mask_BTW"], keys)
  key = np.broadcast_to(key, (*key.shape[:2], *query.shape[2:]))
  logits = SCALE * np.einsum("bthq,bshq->bths", query, key)
  logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
  return np.asarray(jax.nn.logsumexp(logits, axis=-1))


def value_and_gradients(problem, implementation, dtype=jnp.float32):
  """Returns (sum of weighted KL, kl_BT, gradients of the trained arrays)."""
  trained, (query, key, lse, slots), options = problem
  weights = np.linspace(-1, 2, slots.size, dtype=np.float32)
  trained = tuple(jnp.asarray(x, dtype) for x in trained)
  run = functools.partial(
    indexer_kl_loss, scale=SCALE, implementation=implementation, **options
  )

  def loss(*trained):
    arrays = (jnp.asarray(query, dtype), jnp.asarray(key, dtype), lse, slots)
    return run(*trained, *arrays, weights.reshape(slots.shape))

  graded = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (total, kl_BT), gradients = jax.jit(graded)(*trained)
  return total, kl_BT, *gradients


CASES = {
  "one tile, causal": ((5, 9, 2, 8, 3, 6), {}),
  "several tiles, masked": ((140, 600, 2, 8, 3, 6), {"mask": True}),
  "groups of heads, segments": (
    (20, 300, 2, 8, 16, 6),
    {"segments": True, "mask": True},
  ),
  "one key head": ((20, 300, 2, 8, 16, 6), {"shared": True}),
  "several query tiles": ((300, 70, 1, 8, 2, 6), {"segments": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
  shape, given = CASES[name]
  problem = draw_problem(
    shape, **({"shared": False, "mask": False, "segments": False} | given)
  )
  wanted = value_and_gradients(problem, "ref")
  found = value_and_gradients(problem, "tpu_interpret")
  for want, got in zip(wanted, found, strict=True):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6 * scale)


def test_bfloat16_is_near_float32():
  problem = draw_problem(
    (20, 70, 4, 16, 2, 16), shared=False, mask=True, segments=False, seed=3
  )
  wanted = value_and_gradients(problem, "ref", jnp.bfloat16)
  found = value_and_gradients(problem, "tpu_interpret", jnp.bfloat16)
  for want, got in zip(wanted, found, strict=True):
    assert got.dtype == want.dtype
    want, got = np.float32(want), np.float32(got)
    assert np.abs(got - want).max() <= 0.01 * np.abs(want).max()
