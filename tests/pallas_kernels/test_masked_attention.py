"""Masked attention against float64 numpy, and against itself in other forms."""
# B batch, T queries, S keys, H heads, G key heads, Q key width, V value width

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels.masked_attention import masked_attention
from tests.support.tolerances import TOLERANCE
from tests.support.tolerances import assert_close

SCALE = 0.35
IMPLEMENTATIONS = ["ref", "xla"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Sizes of a problem and what hides keys in it."""

  batch: int = 1
  queries: int
  keys: int
  heads: int = 2
  key_heads: int = 2
  width: int = 6
  value: int = 5
  masked: bool = False
  segments: bool = False
  causal: bool = False


CASES = {
  "causal": Case(queries=37, keys=37, causal=True),
  "odd_tiles": Case(batch=2, queries=530, keys=1100, masked=True),
  "mqa": Case(batch=2, queries=9, keys=70, heads=4, key_heads=1, masked=True),
  "mqa_blocks": Case(queries=3, keys=40, heads=12, key_heads=1, segments=True),
  "mha_blocks": Case(batch=2, queries=5, keys=33, heads=11, key_heads=11),
  "segments": Case(batch=2, queries=20, keys=65, masked=True, segments=True),
  "decode": Case(batch=3, queries=1, keys=300, heads=4, key_heads=4),
  "one": Case(queries=1, keys=1, heads=1, key_heads=1, width=1, value=1),
}


def draw(case, seed=0):
  """Returns arrays, slots, keywords and the bool [B,T,S] of seen keys."""
  rng = np.random.default_rng(seed)
  batch, queries, keys = case.batch, case.queries, case.keys
  shapes = (
    (batch, queries, case.heads, case.width),
    (batch, keys, case.key_heads, case.width),
    (batch, keys, case.key_heads, case.value),
  )
  arrays = tuple(rng.normal(size=s).astype(np.float32) for s in shapes)
  if case.causal:
    slots = np.broadcast_to(
      np.arange(queries, dtype=np.int32), (batch, queries)
    )
  else:
    slots = rng.integers(-1, keys, (batch, queries)).astype(np.int32)
    slots[0, 0] = keys - 1
    slots[-1, -1] = -1 if queries > 1 else 0
  seen = np.arange(keys) <= slots[:, :, None]
  keywords = {}
  if case.masked:
    mask = rng.random((batch, queries, keys)) < 0.3
    mask[:, queries // 2] = False
    seen &= mask
    keywords["mask_BTW"] = np.asarray(bitmask.pack(mask))
  if case.segments:
    query_segments = rng.integers(0, 3, (batch, queries)).astype(np.int32)
    key_segments = np.sort(rng.integers(0, 3, (batch, keys)).astype(np.int32))
    seen &= query_segments[:, :, None] == key_segments[:, None]
    keywords["query_segments_BT"] = query_segments
    keywords["key_segments_BS"] = key_segments
  return arrays, slots, keywords, seen


def oracle(query, key, value, seen, d_out):
  """Returns out, lse and the gradients of query, key, value in float64."""
  query, key, value, d_out = (
    np.asarray(a, np.float64) for a in (query, key, value, d_out)
  )
  heads, key_heads = query.shape[2], key.shape[2]
  key_all, value_all = (
    np.repeat(a, heads // key_heads, axis=2) for a in (key, value)
  )
  logits = SCALE * np.einsum("bthq,bshq->bths", query, key_all)
  logits = np.where(seen[:, :, None], logits, -np.inf)
  top = np.max(logits, axis=-1, keepdims=True)
  exp = np.exp(logits - np.where(np.isinf(top), 0.0, top))
  total = exp.sum(-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = (np.where(np.isinf(top), 0.0, top) + np.log(total))[..., 0]
  weights = exp / np.where(total == 0.0, 1.0, total)
  out = np.einsum("bths,bshv->bthv", weights, value_all)
  d_weights = np.einsum("bthv,bshv->bths", d_out, value_all)
  mean = np.sum(weights * d_weights, axis=-1, keepdims=True)
  d_logits = SCALE * weights * (d_weights - mean)
  d_query = np.einsum("bths,bshq->bthq", d_logits, key_all)
  d_key = np.einsum("bths,bthq->bshq", d_logits, query)
  d_value = np.einsum("bths,bthv->bshv", weights, d_out)
  grouped = (*key.shape[:3], heads // key_heads, -1)
  return (
    out,
    lse,
    d_query,
    d_key.reshape(grouped).sum(3),
    d_value.reshape(grouped).sum(3),
  )


def run(implementation, arrays, slots, keywords, d_out):
  """Returns out, lse and the gradients of the code under test."""

  @jax.jit
  def both(arrays, d_out):
    def attend(*arrays):
      return masked_attention(
        *arrays, slots, scale=SCALE, implementation=implementation, **keywords
      )

    (out, lse), pull_back = jax.vjp(attend, *arrays)
    # The cotangent of lse is ignored, whatever it is.
    return out, lse, *pull_back((d_out, jnp.full_like(lse, 7.0)))

  return both(arrays, d_out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(name, implementation):
  case = CASES[name]
  arrays, slots, keywords, seen = draw(case)
  d_out = np.random.default_rng(1).normal(
    size=(case.batch, case.queries, case.heads, case.value)
  )
  d_out = d_out.astype(np.float32)
  # Keys gather gradients from many queries: keep their sums of order one.
  d_out /= np.sqrt(case.queries)
  got = run(implementation, arrays, slots, keywords, d_out)
  want = oracle(*arrays, seen, d_out)
  for one_got, one_want in zip(got, want):
    assert one_got.dtype == np.float32
    assert_close(one_got, one_want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_are_summed_in_float32(implementation):
  case = Case(queries=40, keys=200, heads=2, key_heads=1, masked=True)
  arrays, slots, keywords, seen = draw(case)
  arrays = tuple(jnp.asarray(a, jnp.bfloat16) for a in arrays)
  d_out = jnp.ones((1, 40, 2, case.value), jnp.bfloat16) / 8
  got = run(implementation, arrays, slots, keywords, d_out)
  want = oracle(*arrays, seen, d_out)
  for index in (0, 2, 3, 4):
    assert got[index].dtype == jnp.bfloat16
    assert_close(got[index], want[index])
  assert got[1].dtype == jnp.float32
  assert_close(got[1], want[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_that_see_nothing_are_zero_without_nan(implementation):
  arrays, _, _, _ = draw(Case(queries=6, keys=40))
  slots = np.full((1, 6), -1, np.int32)
  d_out = np.ones((1, 6, 2, 5), np.float32)
  out, lse, *gradients = run(implementation, arrays, slots, {}, d_out)
  assert np.all(np.asarray(lse) == -np.inf)
  for array in (out, *gradients):
    assert not np.any(np.asarray(array))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
  arrays, slots, keywords, seen = draw(Case(queries=7, keys=70, masked=True))
  arrays = (arrays[0] * 100.0, arrays[1], arrays[2])
  d_out = np.zeros((1, 7, 2, 5), np.float32)
  out, lse, *_ = run(implementation, arrays, slots, keywords, d_out)
  want = oracle(*arrays, seen, d_out)
  # A score of some hundreds carries its own rounding into the exponent.
  relative = 200.0 * TOLERANCE["float32"][0]
  np.testing.assert_allclose(out, want[0], rtol=relative, atol=relative)
  np.testing.assert_allclose(lse, want[1], rtol=TOLERANCE["float32"][0])


def test_a_shard_of_the_queries_equals_its_part_of_the_whole():
  arrays, slots, keywords, _ = draw(Case(queries=48, keys=96, masked=True))
  attend = jax.jit(
    lambda query, slots, mask: masked_attention(
      query, *arrays[1:], slots, scale=SCALE, mask_BTW=mask
    )
  )
  whole = attend(arrays[0], slots, keywords["mask_BTW"])
  picked = np.random.default_rng(2).permutation(48)[:24]
  part = attend(
    arrays[0][:, picked], slots[:, picked], keywords["mask_BTW"][:, picked]
  )
  assert_close(part[0], np.asarray(whole[0])[:, picked])
  assert_close(part[1], np.asarray(whole[1])[:, picked])


def test_a_full_mask_is_no_mask():
  arrays, slots, _, _ = draw(Case(queries=40, keys=70))
  mask = np.full((1, 40, 3), 0xFFFFFFFF, np.uint32)
  d_out = np.ones((1, 40, 2, 5), np.float32) / 8
  with_mask = run("xla", arrays, slots, {"mask_BTW": mask}, d_out)
  without = run("xla", arrays, slots, {}, d_out)
  for got, want in zip(with_mask, without):
    assert_close(got, want)


def test_bad_input_is_told():
  arrays, slots, _, _ = draw(Case(queries=4, keys=40))
  query, key, value = arrays

  def call(*arrays, **keywords):
    return masked_attention(*arrays, scale=1.0, **keywords)

  with pytest.raises(ValueError, match="implementation='cuda'"):
    call(query, key, value, slots, implementation="cuda")
  with pytest.raises(ValueError, match="key_heads=3"):
    call(query, np.zeros((1, 40, 3, 6), "f4"), np.zeros((1, 40, 3, 5)), slots)
  with pytest.raises(ValueError, match="value_BSGV"):
    call(query, key, value[:, :7], slots)
  with pytest.raises(ValueError, match="mask_BTW"):
    call(query, key, value, slots, mask_BTW=np.zeros((1, 4, 1), np.uint32))
  with pytest.raises(ValueError, match="given together"):
    call(query, key, value, slots, query_segments_BT=slots)
  with pytest.raises(ValueError, match="slots_BT"):
    call(query, key, value, slots[:, :2])
