"""The TPU kernel, interpreted, against the definition on exact scores.

Inputs are small integers, so that scores are exact in every order of addition
and selections must be equal bit for bit. The interpreter fills memory that was
never written with NaN.
"""
# B batch, T queries, S keys, I index heads, K index width, N selected keys

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels.index_select import index_select
from pallas_kernels.index_select import order
from pallas_kernels.index_select import tpu_scores
from pallas_kernels.index_select import tpu_search
from tests.support.tolerances import TOLERANCE


@functools.partial(jax.jit, static_argnames=("top_k",))
def run_both(arrays, options, top_k):
  return [
    index_select(
      *arrays,
      **options,
      top_k=top_k,
      want_indices=True,
      implementation=implementation,
    )
    for implementation in ("tpu_interpret", "ref")
  ]


def check(arrays, top_k, **options):
  """Compares all fields; selections must be equal."""
  got, want = run_both(arrays, options, top_k)
  np.testing.assert_array_equal(got.mask_BTW, want.mask_BTW)
  np.testing.assert_array_equal(got.indices_BTN, want.indices_BTN)
  np.testing.assert_array_equal(got.invalid_BT, want.invalid_BT)
  rtol, atol = TOLERANCE["float32"]
  for name in ("lse_all_BT", "lse_selected_BT"):
    np.testing.assert_allclose(
      getattr(got, name), getattr(want, name), rtol=rtol, atol=atol
    )
  return got


def integer_arrays(batch, queries, num_keys, heads, width, seed):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.integers(-3, 4, shape).astype(np.float32)

  return [
    draw(batch, queries, heads, width),
    draw(batch, num_keys, width),
    draw(batch, queries, heads),
    rng.integers(-1, num_keys, (batch, queries)).astype(np.int32),
  ]


def special_arrays():
  """Nine queries of one head whose scores equal key * weight, for 1100 keys."""
  key_S = 1 + np.random.default_rng(2).permutation(1100)
  return [
    np.ones((1, 9, 1, 1), np.float32),
    key_S.astype(np.float32)[None, :, None],
    np.ones((1, 9, 1), np.float32),
    np.full((1, 9), 1099, np.int32),
  ]


def test_segments_over_several_tiles():
  """Full tiles of 128 queries, an odd number of heads, hidden key tiles."""
  arrays = integer_arrays(2, 130, 1300, 3, 4, seed=0)
  arrays[3][0] = np.minimum(arrays[3][0], 700)
  rng = np.random.default_rng(1)
  key_segments_BS = np.sort(rng.integers(0, 3, (2, 1300)), axis=1)
  query_segments_BT = rng.integers(0, 4, (2, 130))
  check(
    arrays,
    64,
    query_segments_BT=query_segments_BT.astype(np.int32),
    key_segments_BS=key_segments_BS.astype(np.int32),
  )


def test_quantised_inputs_and_grouped_heads():
  """Two groups of 64 queries share the lanes; five heads do not divide."""
  query, key, weight, slots_BT = integer_arrays(1, 50, 700, 5, 3, seed=3)
  arrays = [
    jnp.asarray(query, jnp.float8_e4m3fn),
    jnp.asarray(key, jnp.float8_e4m3fn),
    weight,
    slots_BT,
  ]
  exponent_BS = np.random.default_rng(4).integers(-2, 3, (1, 700))
  scale_BS = np.exp2(exponent_BS).astype(np.float32)
  got = check(arrays, 33, key_scale_BS=scale_BS)
  assert bitmask.unpack(got.mask_BTW, 700).sum(-1).max() == 33


@pytest.mark.parametrize(
  "case",
  ["distinct", "equal", "ties", "infinite", "minus infinite", "padded"],
)
def test_special_values(case):
  arrays = special_arrays()
  _, key, weight, slots_BT = arrays
  invalid = []
  if case == "equal":
    weight[...] = 0.0
  elif case == "ties":
    # A dozen keys stand out, above or below a sea of zeros and minus zeros.
    outstanding_S = np.random.default_rng(1).permutation(1100) < 12
    key[0, :, 0] = np.where(outstanding_S, 3.0, -1.0)
    weight[0, ::2] = -1.0
  elif case == "infinite":
    key[0, [4, 9, 20], 0] = np.inf
    key[0, 30, 0] = np.nan
    weight[0, :, 0] = [1, -1, 1, 1, -1, 1, -1, 1, 1]
    slots_BT[...] = [29, 29, 30, 3, 1099, 8, 5, 4, 20]
    invalid = [2, 4]
  elif case == "minus infinite":
    key[...], weight[...] = np.inf, -1.0
    slots_BT[...] = [7, 2, 0, -1, 1099, 3, 4, 5, 2]
  elif case == "padded":
    key[0, 20] = np.nan
    slots_BT[...] = [-1, 0, 1099, -1, 3, 2000, -1, 12, -1]
    invalid = [2, 5]
  got = check(arrays, 40)
  assert np.flatnonzero(got.invalid_BT).tolist() == invalid
  assert (np.asarray(got.indices_BTN)[0, invalid] == -1).all()


class Rows:
  """An array that is sliced like the scratch of the kernel."""

  def __init__(self, array):
    self.array = array

  def __getitem__(self, index):
    rows, _ = index
    return jax.lax.dynamic_slice_in_dim(self.array, rows.start, rows.size)


@functools.partial(jax.jit, static_argnames=("top_k",))
def run_search(score_SL, top_k):
  ordered_SL = order.encode(score_SL)
  sizes = tpu_scores.Sizes(128, 1024, 1, 128, top_k, jnp.dtype(jnp.float32))
  start = tpu_search.Bracket(
    step=jnp.int32(0),
    low_1L=jnp.min(ordered_SL, axis=0, keepdims=True),
    high_1L=jnp.max(ordered_SL, axis=0, keepdims=True) + 1,
    at_low_1L=jnp.full((1, 128), len(score_SL), jnp.int32),
    at_high_1L=jnp.zeros((1, 128), jnp.int32),
  )
  wanted_1L = jnp.full((1, 128), top_k, jnp.int32)
  num_tiles = len(score_SL) // sizes.tile
  return tpu_search.search(sizes, num_tiles, Rows(ordered_SL), wanted_1L, start)


@pytest.mark.parametrize("case", ["normal", "all codes", "tied", "extremes"])
def test_search_ends_in_few_passes(case):
  """Brackets agree with a sort; passes are few, and bounded at the worst."""
  rng = np.random.default_rng(7)
  score_SL = rng.normal(size=(4096, 128)).astype(np.float32)
  most = 20
  if case == "all codes":
    codes_SL = rng.integers(0, 2**31 - 2**24, (4096, 128), dtype=np.int32)
    score_SL = codes_SL.view(np.float32) * np.sign(score_SL)
    most = 43
  elif case == "tied":
    # Equal scores at the threshold, far from the least and the greatest.
    score_SL[:] = np.float32(2.0) ** (-np.arange(128) // 2)
    score_SL[:200], score_SL[-1] = 3e38, -3e38
    most = 43
  elif case == "extremes":
    # Neighbouring floats at the threshold, all others far away.
    score_SL[:] = -3e38
    score_SL[:100] = 3e38
    score_SL[100:700] = 1 + np.arange(600)[:, None] * np.float32(2**-23)
    most = 43
  top_k = 256
  got = run_search(score_SL, top_k)
  want_L = np.sort(score_SL, axis=0)[-top_k]
  low_L = np.asarray(order.decode(got.low_1L))[0]
  at_low_L = (score_SL >= low_L).sum(0)
  np.testing.assert_array_equal(got.at_low_1L[0], at_low_L)
  assert ((at_low_L == top_k) | (low_L == want_L)).all()
  assert (at_low_L >= top_k).all() and (low_L <= want_L).all()
  assert int(got.step) <= most


def test_too_many_keys_are_refused():
  shapes = (1, 1, 1, 1), (1, 2**19, 1), (1, 1, 1)
  arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
  slots_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  select = functools.partial(index_select, top_k=1, implementation="tpu")
  with pytest.raises(ValueError, match="num_keys=524288"):
    jax.eval_shape(select, *arrays, slots_BT)
