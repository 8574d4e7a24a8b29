"""Gathered attention against float64 numpy, and against the masked form."""
# B batch, T queries, S keys, H heads, C latent width, R rope width, N selected

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels.masked_attention import masked_attention
from pallas_kernels.sparse_mla import sparse_mla
from tests.support.tolerances import assert_close

SCALE = 0.35
IMPLEMENTATIONS = ["ref", "xla"]
# batch, queries, keys, heads, latent, rope, selected
CASES = {
  "odd": (2, 37, 50, 3, 8, 4, 7),
  "decode": (3, 1, 90, 4, 8, 4, 33),
  "more_than_a_chunk": (1, 150, 40, 2, 5, 3, 9),
  "one": (1, 1, 1, 1, 1, 1, 1),
}


def draw(sizes, seed=0):
  """Returns the four float arrays, indices [B,T,N] and a cotangent."""
  batch, queries, keys, heads, latent, rope, selected = sizes
  rng = np.random.default_rng(seed)
  shapes = (
    (batch, queries, heads, latent),
    (batch, queries, heads, rope),
    (batch, keys, latent),
    (batch, keys, rope),
  )
  arrays = tuple(rng.normal(size=s).astype(np.float32) for s in shapes)
  order = np.argsort(rng.random((batch, queries, max(keys, selected))), -1)
  indices = order[..., :selected].astype(np.int32)
  indices[indices >= keys] = -1
  indices[rng.random(indices.shape) < 0.2] = -1
  if queries > 1:
    indices[0, 0] = -1
  d_out = rng.normal(size=shapes[0]).astype(np.float32) / np.sqrt(queries)
  return arrays, indices, d_out


def oracle(arrays, indices, d_out):
  """Returns out, lse and four gradients in float64."""
  query, query_rope, latent, rope = (np.asarray(a, "f8") for a in arrays)
  query = np.concatenate([query, query_rope], -1)
  key = np.concatenate([latent, rope], -1)
  d_out = np.asarray(d_out, np.float64)
  d_query, d_key = np.zeros_like(query), np.zeros_like(key)
  out, lse = np.zeros(d_out.shape), np.full(d_out.shape[:3], -np.inf)
  width = latent.shape[-1]
  for b, t, h in np.ndindex(*d_out.shape[:3]):
    rows = indices[b, t][indices[b, t] >= 0]
    if not rows.size:
      continue
    logits = SCALE * key[b, rows] @ query[b, t, h]
    top = logits.max()
    weights = np.exp(logits - top)
    lse[b, t, h] = top + np.log(weights.sum())
    weights /= weights.sum()
    out[b, t, h] = weights @ latent[b, rows]
    d_weights = latent[b, rows] @ d_out[b, t, h]
    d_logits = SCALE * weights * (d_weights - weights @ d_weights)
    d_query[b, t, h] = d_logits @ key[b, rows]
    np.add.at(d_key[b], rows, d_logits[:, None] * query[b, t, h])
    np.add.at(d_key[b, :, :width], rows, weights[:, None] * d_out[b, t, h])
  return (
    out,
    lse,
    d_query[..., :width],
    d_query[..., width:],
    d_key[..., :width],
    d_key[..., width:],
  )


def run(implementation, arrays, indices, d_out):
  """Returns out, lse and four gradients of the code under test."""

  @jax.jit
  def both(arrays, d_out):
    def attend(*arrays):
      return sparse_mla(
        *arrays, indices, scale=SCALE, implementation=implementation
      )

    (out, lse), pull_back = jax.vjp(attend, *arrays)
    return out, lse, *pull_back((d_out, jnp.full_like(lse, 7.0)))

  return both(arrays, d_out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(name, implementation):
  arrays, indices, d_out = draw(CASES[name])
  got = run(implementation, arrays, indices, d_out)
  for one_got, one_want in zip(got, oracle(arrays, indices, d_out)):
    assert one_got.dtype == np.float32
    assert_close(one_got, one_want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_are_summed_in_float32(implementation):
  arrays, indices, d_out = draw((1, 20, 200, 2, 16, 4, 90))
  arrays = tuple(jnp.asarray(a / 2, jnp.bfloat16) for a in arrays)
  d_out = jnp.asarray(d_out, jnp.bfloat16)
  got = run(implementation, arrays, indices, d_out)
  want = oracle(arrays, indices, d_out)
  for index in (0, 2, 3, 4, 5):
    assert got[index].dtype == jnp.bfloat16
    assert_close(got[index], want[index])
  assert got[1].dtype == jnp.float32
  assert_close(got[1], want[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_lists_give_zero_without_nan(implementation):
  arrays, indices, d_out = draw(CASES["odd"])
  indices = np.full_like(indices, -1)
  out, lse, *gradients = run(implementation, arrays, indices, d_out)
  assert np.all(np.asarray(lse) == -np.inf)
  for array in (out, *gradients):
    assert not np.any(np.asarray(array))


def test_equals_the_masked_form_on_the_same_selection():
  sizes = (2, 21, 60, 3, 8, 4, 13)
  arrays, indices, d_out = draw(sizes)
  got = run("xla", arrays, indices, d_out)
  mask_BTW = bitmask.from_indices(indices, 60)
  slots_BT = np.full((2, 21), 59, np.int32)

  @jax.jit
  def masked(query, query_rope, latent, rope):
    query_BTHQ = jnp.concatenate([query, query_rope], -1)
    key_BS1Q = jnp.concatenate([latent, rope], -1)[:, :, None]
    out, lse = masked_attention(
      query_BTHQ,
      key_BS1Q,
      latent[:, :, None],
      slots_BT,
      scale=SCALE,
      mask_BTW=mask_BTW,
    )
    return out, lse

  (out, lse), pull_back = jax.vjp(masked, *arrays)
  want = (out, lse, *pull_back((jnp.asarray(d_out), jnp.zeros_like(lse))))
  for one_got, one_want in zip(got, want):
    assert_close(one_got, one_want)


def test_bad_input_is_told():
  arrays, indices, _ = draw(CASES["odd"])
  with pytest.raises(ValueError, match="implementation='cuda'"):
    sparse_mla(*arrays, indices, scale=1.0, implementation="cuda")
  with pytest.raises(ValueError, match="indices_BTN"):
    sparse_mla(*arrays, indices[:, :3], scale=1.0)
  with pytest.raises(ValueError, match="signed integer"):
    sparse_mla(*arrays, indices.astype(np.uint32), scale=1.0)
  with pytest.raises(ValueError, match="key_rope_BSR"):
    sparse_mla(*arrays[:3], arrays[3][:, :5], indices, scale=1.0)
