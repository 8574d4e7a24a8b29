"""Scores over a paged cache against equation 1 in float64."""
# B requests, N pages of a request, P pages of the cache, Z keys of a page,
# S keys of a request, I index heads, K index width

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cases
from pallas_kernels import problems
from pallas_kernels.decode_scores import decode_scores
from pallas_kernels.decode_scores import gpu
from tests.support.mosaic_gpu import assert_close
from tests.support.mosaic_gpu import interpreted
from tests.support.mosaic_gpu import interpreter

IMPLEMENTATIONS = ["ref", "xla", "tpu_interpret"]

run = functools.partial(jax.jit, static_argnames=("implementation", "run"))(
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_runs_of_requests_that_have_one_table(implementation):
  # The second of a run reaches a page that the first does not, and of the last
  # run nothing is there.
  lengths = (640, 641, 64, 65, 0, 0)
  inputs = arrays(lengths, 11, 64, 5)
  inputs[4] = np.repeat(inputs[4][::2], 2, axis=0)
  want_BS = float64_scores(*inputs)
  got_BS = run(*inputs, implementation=implementation, run=2)
  np.testing.assert_array_equal(got_BS, want_BS)


def test_a_run_that_does_not_divide_the_requests():
  with pytest.raises(ValueError, match="run=2 does not divide"):
    decode_scores(*arrays((9, 8, 7), 1, 32, 2), run=2)


@interpreted
@pytest.mark.parametrize(
  "lengths,num_pages,page_size",
  [
    ((700, 0, 1, 256, 640), 11, 64),
    ((31,), 1, 32),
    pytest.param((129, 4000, 2048), 32, 128, marks=pytest.mark.slow),
    pytest.param((300, 512), 2, 256, marks=pytest.mark.slow),
  ],
)
def test_scores_of_hopper_are_exact(lengths, num_pages, page_size):
  inputs = arrays(lengths, num_pages, page_size, 5)
  want_BS = float64_scores(*inputs)
  inputs[0] = jnp.asarray(inputs[0], jnp.float8_e4m3fn)
  got_BS = gpu.scores(*map(jnp.asarray, inputs), interpret=interpreter())
  np.testing.assert_array_equal(got_BS, want_BS)


@interpreted
def test_hopper_takes_keys_of_16_bits_without_scales():
  inputs = arrays((300, 20), 5, 64, 3)
  inputs[3] = np.ones_like(inputs[3])
  want_BS = float64_scores(*inputs)
  query, page = (jnp.asarray(x, jnp.bfloat16) for x in (inputs[0], inputs[2]))
  inputs = [query, inputs[1], page, None, *map(jnp.asarray, inputs[4:])]
  got_BS = gpu.scores(*inputs, interpret=interpreter())
  np.testing.assert_array_equal(got_BS, want_BS)


@interpreted
@pytest.mark.parametrize("blocks", [1, gpu.BLOCKS])
@pytest.mark.parametrize(
  "case",
  [c for c in cases.CHECKS if c.operation == "decode_scores"],
  ids=lambda case: case.name,
)
def test_hopper_agrees_with_the_reference(case, blocks, monkeypatch):
  # With a block for all tiles of a request, and with one for each.
  monkeypatch.setattr(gpu, "BLOCKS", blocks)
  arrays = problems.draw(case, "float8_e4m3fn")
  got = gpu.scores(
    *(arrays[name] for name in problems.PAGED), interpret=interpreter()
  )
  want = problems.call(case, "ref", arrays)["scores"]
  assert_close(got, want, "float32")


def test_wrong_arguments_are_named():
  inputs = arrays((20,), 1, 32, 2)
  with pytest.raises(ValueError, match="implementation='cuda'"):
    decode_scores(*inputs, implementation="cuda")
  with pytest.raises(ValueError, match=r"query_BIK\.dtype"):
    decode_scores(*inputs, implementation="gpu")
  for other in (
    arrays((20,), 1, 48, 2),
    arrays((20,), 1, 32, 65),
    arrays((9,), 1, 32, 2, 129),
  ):
    other[0] = jnp.asarray(other[0], jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"page_size=|at most"):
      decode_scores(*other, implementation="gpu")
  with pytest.raises(ValueError, match=r"scale_PZ\.shape"):
    decode_scores(*inputs[:3], inputs[3][:, 1:], *inputs[4:])
  with pytest.raises(ValueError, match=r"page_PZK\.dtype"):
    decode_scores(*inputs[:2], inputs[2].astype("int8"), *inputs[3:])
  with pytest.raises(ValueError, match=r"x\.dtype"):
    decode_scores(*inputs[:5], inputs[5].astype("float32"))
  narrow = arrays((20,), 1, 32, 2, width=64)
  with pytest.raises(ValueError, match="multiple of 128"):
    decode_scores(*narrow, implementation="tpu")
