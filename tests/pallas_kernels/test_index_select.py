"""Selection against a numpy sort: ties, infinities, NaN, segments, slots."""
# B batch, T queries, S keys, I index heads, K index width, N selected keys

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels import fp8
from pallas_kernels.index_select import index_scores
from pallas_kernels.index_select import index_select
from tests.support.tolerances import TOLERANCE

IMPLEMENTATIONS = ["ref", "xla"]


@functools.partial(
  jax.jit, static_argnames=("top_k", "implementation", "segmented")
)
def run_select(arrays, segments, top_k, implementation, segmented):
  query_segments_BT, key_segments_BS = segments if segmented else (None, None)
  return index_select(
    *arrays,
    top_k=top_k,
    query_segments_BT=query_segments_BT,
    key_segments_BS=key_segments_BS,
    want_indices=True,
    implementation=implementation,
  )


def float64_scores(query_BTIK, key_BSK, weight_BTI):
  """Equation 1, in numpy."""
  dot = np.einsum(
    "BTIK,BSK->BTIS", query_BTIK.astype("f8"), key_BSK.astype("f8")
  )
  return (np.maximum(dot, 0) * weight_BTI.astype("f8")[..., None]).sum(2)


def numpy_allowed(slots_BT, num_keys, segments=None):
  allowed_BTS = np.arange(num_keys) <= np.asarray(slots_BT)[..., None]
  if segments is None:
    return allowed_BTS
  return allowed_BTS & (segments[0][..., None] == segments[1][:, None])


def numpy_select(score_BTS, allowed_BTS, top_k):
  """Each row's best keys by (score descending, index ascending)."""
  chosen_BTS = np.zeros(score_BTS.shape, bool)
  for b, t in np.ndindex(score_BTS.shape[:2]):
    keys = np.flatnonzero(allowed_BTS[b, t])
    row = score_BTS[b, t, keys]
    if not np.isnan(row).any():
      order = np.lexsort((keys, -(row + 0.0)))
      chosen_BTS[b, t, keys[order[:top_k]]] = True
  return chosen_BTS


def numpy_lse(score_BTS, where_BTS):
  masked = np.where(where_BTS, score_BTS, -np.inf).astype("f8")
  top = np.max(masked, -1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  with np.errstate(divide="ignore"):
    return np.log(np.exp(masked - top).sum(-1)) + top[..., 0]


def check(arrays, top_k, implementation, segments=None):
  """Compares a selection with the sort; scores must be exact in float32."""
  query, key, weight, slots_BT = arrays
  score_BTS = float64_scores(query, key, weight)
  allowed_BTS = numpy_allowed(slots_BT, key.shape[1], segments)
  want_BTS = numpy_select(score_BTS, allowed_BTS, top_k)
  got = run_select(
    arrays, segments, top_k, implementation, segments is not None
  )
  got_BTS = bitmask.unpack(got.mask_BTW, key.shape[1])
  np.testing.assert_array_equal(got_BTS, want_BTS)
  np.testing.assert_array_equal(
    bitmask.from_indices(got.indices_BTN, key.shape[1]), got.mask_BTW
  )
  count_BT = want_BTS.sum(-1)
  listed_BTN = np.asarray(got.indices_BTN) >= 0
  assert got.indices_BTN.shape[-1] == top_k
  np.testing.assert_array_equal(listed_BTN.sum(-1), count_BT)
  np.testing.assert_array_equal(
    listed_BTN, np.arange(top_k) < count_BT[..., None]
  )
  ascends_BTN = np.diff(got.indices_BTN, axis=-1) > 0
  assert np.all(ascends_BTN | ~listed_BTN[..., 1:])
  invalid_BT = (np.isnan(score_BTS) & allowed_BTS).any(-1)
  np.testing.assert_array_equal(got.invalid_BT, invalid_BT)
  rtol, atol = TOLERANCE["float32"]
  visible_BTS = allowed_BTS & ~invalid_BT[..., None]
  for lse_BT, where_BTS in (
    (got.lse_all_BT, visible_BTS),
    (got.lse_selected_BT, want_BTS),
  ):
    want_BT = numpy_lse(np.where(where_BTS, score_BTS, 0), where_BTS)
    np.testing.assert_allclose(lse_BT, want_BT, rtol=rtol, atol=atol)
  return got


def integer_arrays(queries, num_keys, *, batch=1, heads=3, width=4, seed=0):
  """Small integers: exact in float32, many exact ties, zeros and -0.0."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.integers(-3, 4, shape).astype(np.float32)

  return [
    draw(batch, queries, heads, width),
    draw(batch, num_keys, width),
    draw(batch, queries, heads),
    np.broadcast_to(
      np.arange(num_keys - queries, num_keys, dtype=np.int32), (batch, queries)
    ),
  ]


def scored_arrays(score_TS, slots_T=None):
  """One head and keys that are unit vectors: score[t, s] >= 0 is given."""
  score_TS = np.asarray(score_TS, np.float32)
  queries, num_keys = score_TS.shape
  if slots_T is None:
    slots_T = np.full(queries, num_keys - 1)
  return [
    score_TS[None, :, None, :],
    np.eye(num_keys, dtype=np.float32)[None],
    np.ones((1, queries, 1), np.float32),
    np.asarray(slots_T, np.int32)[None],
  ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "queries,num_keys,top_k",
  [(70, 70, 16), (130, 600, 64), (5, 5, 9), (1, 257, 20)],
)
def test_small_integers(queries, num_keys, top_k, implementation):
  check(integer_arrays(queries, num_keys, batch=2), top_k, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_thousands_of_ties_at_the_threshold(implementation):
  """A dozen keys stand out, below or above a sea of zeros and minus zeros."""
  rng = np.random.default_rng(1)
  arrays = integer_arrays(3, 5000, heads=2, width=2)
  key_S = rng.permutation(5000) < 12
  arrays[1][0] = np.where(key_S[:, None], [3.0, 0.0], [-1.0, 0.0])
  arrays[0][0, :, :, 0] = [[1.0, 1.0]] * 3
  arrays[0][0, :, :, 1] = 0
  arrays[2][0] = [[1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]]
  check(arrays, 40, implementation)


def special_arrays():
  """Nine queries of one head whose scores equal key * weight, for 50 keys."""
  query, key, weight, slots_BT = integer_arrays(9, 50, heads=1, width=1)
  query[...] = 1.0
  key[0, :, 0] = 1 + np.random.default_rng(2).permutation(50)
  weight[...] = 1.0
  return [query, key, weight, np.full_like(slots_BT, 49)]


def check_special(arrays, implementation):
  """Checks nine queries together, and by twos, which go another way."""
  query, key, weight, slots_BT = arrays
  for start in range(0, 8, 2):
    rows = np.s_[:, start : start + 2]
    pair = [query[rows], key, weight[rows], slots_BT[rows]]
    check(pair, 5, implementation)
  return check(arrays, 5, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_score_equal(implementation):
  arrays = special_arrays()
  arrays[2][...] = 0.0
  got = check_special(arrays, implementation)
  np.testing.assert_array_equal(got.indices_BTN[0, -1], np.arange(5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_and_nan_scores(implementation):
  """NaN counts only where it is allowed; infinities are scores like others."""
  arrays = special_arrays()
  arrays[1][0, [4, 9, 20], 0] = np.inf
  arrays[1][0, 30, 0] = np.nan
  arrays[2][0, :, 0] = [1, -1, 1, 1, -1, 1, -1, 1, 1]
  arrays[3] = np.array([[29, 29, 30, 3, 49, 8, 5, 4, 20]], np.int32)
  with np.errstate(invalid="ignore"):
    got = check_special(arrays, implementation)
  assert np.flatnonzero(got.invalid_BT).tolist() == [2, 4]
  assert not np.isnan(np.asarray(got.lse_all_BT)).any()
  assert (np.asarray(got.indices_BTN)[0, [2, 4]] == -1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_minus_infinity_is_selected_before_a_hidden_key(implementation):
  arrays = special_arrays()
  arrays[1][...], arrays[2][...] = np.inf, -1.0
  arrays[3] = np.array([[7, 2, 0, -1, 49, 3, 4, 5, 2]], np.int32)
  got = check_special(arrays, implementation)
  assert np.asarray(got.indices_BTN)[0, 1].tolist() == [0, 1, 2, -1, -1]
  assert (np.asarray(got.lse_all_BT) == -np.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_minus_zero_ties_with_zero(implementation):
  arrays = special_arrays()
  arrays[1][...] = 0.0
  arrays[1][0, 1::2] = -1.0
  arrays[2][0, ::2] = -1.0
  check_special(arrays, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padded_rows_select_nothing(implementation):
  arrays = special_arrays()
  arrays[3] = np.array([[-1, 0, 49, -1, 3, 100, -1, 12, -1]], np.int32)
  arrays[1][0, 20] = np.nan
  with np.errstate(invalid="ignore"):
    got = check_special(arrays, implementation)
  assert np.isneginf(np.asarray(got.lse_all_BT)[0, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_and_arbitrary_slots(implementation):
  rng = np.random.default_rng(3)
  arrays = integer_arrays(75, 300, batch=2, seed=3)
  arrays[3] = rng.integers(-1, 300, (2, 75)).astype(np.int32)
  key_segments_BS = np.sort(rng.integers(0, 5, (2, 300)), axis=1)
  query_segments_BT = rng.integers(0, 6, (2, 75))
  segments = (query_segments_BT.astype("i4"), key_segments_BS.astype("i4"))
  check(arrays, 17, implementation, segments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_of_one_query_against_a_cache(batch, implementation):
  arrays = integer_arrays(1, 1100, batch=batch, heads=8, width=16, seed=4)
  arrays[3] = np.array([[700], [3], [1099]], np.int32)[:batch]
  check(arrays, 128, implementation)


def test_rows_of_many_scales():
  """Scores from subnormal to huge, in rows of few and of many keys."""
  rng = np.random.default_rng(5)
  score_TS = rng.normal(size=(64, 600)) ** 2
  score_TS *= 10.0 ** rng.integers(-40, 38, (64, 1))
  score_TS[::3, ::2] = score_TS[::3, 1::2]
  score_TS[5] = 0.0
  slots_T = rng.integers(0, 600, 64)
  arrays = scored_arrays(score_TS, slots_T)
  got = run_select(arrays, None, 37, "xla", False)
  # XLA on CPU flushes subnormal results to zero; so does the expectation.
  tiny = np.finfo(np.float32).tiny
  score_TS = np.where(score_TS.astype("f4") < tiny, 0.0, score_TS.astype("f4"))
  want = numpy_select(score_TS[None], numpy_allowed(arrays[3], 600), 37)
  np.testing.assert_array_equal(bitmask.unpack(got.mask_BTW, 600), want)


def test_implementations_agree_on_random_floats():
  """Equal selections, or different ones within rounding of the k-th score."""
  rng = np.random.default_rng(6)
  arrays = [
    rng.normal(size=(2, 150, 8, 32)).astype("f4"),
    rng.normal(size=(2, 1300, 32)).astype("f4"),
    rng.normal(size=(2, 150, 8)).astype("f4"),
    rng.integers(0, 1300, (2, 150)).astype("i4"),
  ]
  got = run_select(arrays, None, 100, "xla", False)
  got_BTS = np.asarray(bitmask.unpack(got.mask_BTW, 1300))
  score_BTS = float64_scores(*arrays[:3])
  allowed_BTS = numpy_allowed(arrays[3], 1300)
  want_BTS = numpy_select(score_BTS, allowed_BTS, 100)
  np.testing.assert_array_equal(got_BTS.sum(-1), want_BTS.sum(-1))
  worst_BT = np.where(want_BTS, score_BTS, np.inf).min(-1)
  slack_BT = 1e-5 * np.abs(np.where(allowed_BTS, score_BTS, 0)).max(-1)
  distance_BTS = np.abs(score_BTS - worst_BT[..., None])
  assert (distance_BTS <= slack_BT[..., None])[got_BTS != want_BTS].all()


def test_many_heads_equal_the_scores():
  """More heads than one group, and not a multiple of it."""
  check(integer_arrays(66, 530, heads=19, width=6, seed=7), 50, "xla")


def test_quantised_inputs_use_key_scales():
  rng = np.random.default_rng(8)
  query, query_scale = fp8.quantize(rng.normal(size=(1, 40, 4, 128)))
  key, key_scale = fp8.quantize(rng.normal(size=(1, 200, 128)) * 5)
  weight = rng.normal(size=(1, 40, 4)).astype("f4") * query_scale[..., 0]
  scale_BS = key_scale[..., 0]
  slots_BT = np.arange(160, 200, dtype=np.int32)[None]
  score_BTS = float64_scores(
    np.asarray(query, "f4"), np.asarray(key, "f4"), np.asarray(weight)
  )
  score_BTS = score_BTS * np.asarray(key_scale)[:, None, :, 0]
  want_BTS = numpy_select(score_BTS, numpy_allowed(slots_BT, 200), 30)
  for implementation in IMPLEMENTATIONS:
    select = functools.partial(
      index_select, top_k=30, implementation=implementation
    )
    got = jax.jit(lambda *x, select=select: select(*x, key_scale_BS=scale_BS))(
      query, key, weight, slots_BT
    )
    np.testing.assert_array_equal(bitmask.unpack(got.mask_BTW, 200), want_BTS)
  rtol, atol = TOLERANCE["float32"]
  got_BTS = index_scores(query, key, weight, scale_BS)
  np.testing.assert_allclose(
    got_BTS, score_BTS, rtol=rtol, atol=atol * np.abs(score_BTS).max()
  )


def test_wanted_outputs_only():
  arrays = integer_arrays(1, 40)
  got = index_select(*arrays, top_k=4, want_mask=False, want_indices=True)
  assert got.mask_BTW is None and got.indices_BTN.shape == (1, 1, 4)
  got = index_select(*arrays, top_k=4)
  assert got.indices_BTN is None and got.mask_BTW.shape == (1, 1, 2)


def test_no_gradient_flows():
  query, key, weight, slots_BT = integer_arrays(4, 40)

  def loss(query, key, weight):
    return jnp.sum(index_select(query, key, weight, slots_BT, top_k=4)[3])

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, weight)
  for gradient in gradients:
    assert (np.asarray(gradient) == 0).all()


def test_wrong_arguments_are_named():
  query, key, weight, slots_BT = integer_arrays(4, 40)
  with pytest.raises(ValueError, match="top_k=0"):
    index_select(query, key, weight, slots_BT, top_k=0)
  with pytest.raises(ValueError, match="implementation='cuda'"):
    index_select(query, key, weight, slots_BT, top_k=1, implementation="cuda")
  with pytest.raises(ValueError, match=r"weight_BTI\.shape"):
    index_select(query, key, weight[:, 1:], slots_BT, top_k=1)
  with pytest.raises(ValueError, match="given together"):
    index_select(
      query, key, weight, slots_BT, top_k=1, query_segments_BT=slots_BT
    )
