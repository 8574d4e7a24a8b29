"""Scores over a paged cache against equation 1 in float64."""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request, I index heads, K index width

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_scores import decode_scores

IMPLEMENTATIONS = ["ref", "xla", "tpu_interpret"]

run = functools.partial(jax.jit, static_argnames=("implementation",))(
  decode_scores
)


def arrays(lengths, num_pages, page_size, heads, width=128, seed=0):
  """Small integers, exact in float8 and in every order of a float32 sum."""
  rng = np.random.default_rng(seed)
  batch, total = len(lengths), len(lengths) * num_pages + 3
  pages = rng.permutation(total)[: batch * num_pages]

  def draw(*shape):
    return rng.integers(-3, 4, shape).astype(np.float32)

  return [
    draw(batch, heads, width),
    draw(batch, heads),
    jnp.asarray(draw(total, page_size, width), jnp.float8_e4m3fn),
    np.exp2(rng.integers(-2, 3, (total, page_size))).astype(np.float32),
    pages.reshape(batch, num_pages).astype(np.int32),
    np.asarray(lengths, np.int32),
  ]


def float64_scores(query, weight, page, scale, table, lengths):
  page = np.asarray(page, np.float64)
  rows = []
  for b, length in enumerate(lengths):
    key_SK = np.concatenate([page[p] for p in table[b]])
    scale_S = np.concatenate([scale[p] for p in table[b]]).astype(np.float64)
    dot_IS = np.asarray(query[b], np.float64) @ key_SK.T
    score_S = weight[b].astype(np.float64) @ np.maximum(dot_IS, 0) * scale_S
    score_S[length:] = -np.inf
    rows.append(score_S)
  return np.stack(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "lengths,num_pages,page_size,heads",
  [
    ((700, 0, 1, 256, 640), 11, 64, 5),
    ((129, 4000, 2048), 32, 128, 3),
    ((31,), 1, 32, 8),
  ],
)
def test_scores_are_exact(lengths, num_pages, page_size, heads, implementation):
  inputs = arrays(lengths, num_pages, page_size, heads)
  want_BS = float64_scores(*inputs)
  # What lies past the length is never used.
  for row, length in zip(inputs[4], lengths):
    row[-(-length // page_size) :] = -7
  got_BS = run(*inputs, implementation=implementation)
  np.testing.assert_array_equal(got_BS, want_BS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_narrow_queries(dtype, implementation):
  inputs = arrays((200, 300), 5, 64, 4, seed=1)
  want_BS = float64_scores(*inputs)
  inputs[0] = jnp.asarray(inputs[0], dtype)
  got_BS = run(*inputs, implementation=implementation)
  np.testing.assert_array_equal(got_BS, want_BS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_without_scales(dtype, implementation):
  inputs = arrays((200, 0, 300), 5, 64, 4, seed=2)
  inputs[2] = inputs[2].astype(dtype)
  ones_PZ = np.ones_like(inputs[3])
  want_BS = float64_scores(*inputs[:3], ones_PZ, *inputs[4:])
  inputs[3] = None
  got_BS = run(*inputs, implementation=implementation)
  np.testing.assert_array_equal(got_BS, want_BS)


def test_a_longer_table_changes_no_bit():
  query, weight, page, scale, table, lengths = arrays((90, 50), 3, 32, 4)
  rng = np.random.default_rng(3)
  query, weight = (rng.standard_normal(x.shape) for x in (query, weight))
  got_BS = run(query, weight, page, scale, table, lengths)
  longer = np.pad(table, [(0, 0), (0, 61)])
  other_BS = run(query, weight, page, scale, longer, lengths)
  np.testing.assert_array_equal(other_BS[:, : 3 * 32], got_BS)


def test_wrong_arguments_are_named():
  inputs = arrays((20,), 1, 32, 2)
  with pytest.raises(ValueError, match="implementation='gpu'"):
    decode_scores(*inputs, implementation="gpu")
  with pytest.raises(ValueError, match=r"scale_PZ\.shape"):
    decode_scores(*inputs[:3], inputs[3][:, 1:], *inputs[4:])
  with pytest.raises(ValueError, match=r"page_PZK\.dtype"):
    decode_scores(*inputs[:2], inputs[2].astype("int8"), *inputs[3:])
  with pytest.raises(ValueError, match=r"x\.dtype"):
    decode_scores(*inputs[:5], inputs[5].astype("float32"))
  narrow = arrays((20,), 1, 32, 2, width=64)
  with pytest.raises(ValueError, match="multiple of 128"):
    decode_scores(*narrow, implementation="tpu")
