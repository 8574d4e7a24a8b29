"""The TPU kernels of masked attention, interpreted, against the definition."""
# B batch, T queries, S keys, H heads, G key heads, Q key width, V value width

import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels.masked_attention import masked_attention
from pallas_kernels.masked_attention import tpu
from pallas_kernels.masked_attention import tpu_backward
from pallas_kernels.masked_attention import tpu_tiles
from tests.support.tolerances import assert_close

SCALE = 0.35


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
  "causal": Case(queries=300, keys=300, causal=True, heads=1, key_heads=1),
  "one": Case(queries=1, keys=1, heads=1, key_heads=1, width=1, value=1),
  "spans_mqa": Case(queries=9, keys=4300, key_heads=1, masked=True),
  "all": Case(batch=2, queries=20, keys=600, masked=True, segments=True),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  # Several tiles of few keys: the interpreter unrolls what is in a tile.
  for module in (tpu, tpu_backward):
    monkeypatch.setattr(module, "KEYS", 256)


def draw(case, dtype=np.float32):
  """Returns (query, key, value), d_out, slots and keywords."""
  rng = np.random.default_rng(0)
  batch, queries, keys = case.batch, case.queries, case.keys
  shapes = (
    (batch, queries, case.heads, case.width),
    (batch, keys, case.key_heads, case.width),
    (batch, keys, case.key_heads, case.value),
    (batch, queries, case.heads, case.value),
  )
  arrays = [rng.normal(size=s) for s in shapes]
  # Scores of order one whatever the width; sums over queries of order one.
  arrays[0] *= (6 / case.width) ** 0.5
  arrays[3] /= np.sqrt(queries)
  *arrays, d_out = (jnp.asarray(a, dtype) for a in arrays)
  if case.causal:
    slots = np.tile(np.arange(queries, dtype=np.int32), (batch, 1))
  else:
    slots = rng.integers(-1, keys, (batch, queries)).astype(np.int32)
    slots[0, 0] = keys - 1
    slots[-1, -1] = -1 if queries > 1 else 0
  keywords = {}
  if case.masked:
    mask = rng.random((batch, queries, keys)) < 0.3
    mask[:, queries // 2] = False
    keywords["mask_BTW"] = bitmask.pack(jnp.asarray(mask))
  if case.segments:
    keywords["query_segments_BT"] = np.sort(
      rng.integers(0, 3, (batch, queries)).astype(np.int32)
    )
    keywords["key_segments_BS"] = np.sort(
      rng.integers(0, 3, (batch, keys)).astype(np.int32)
    )
  return tuple(arrays), d_out, slots, keywords


def run(implementation, arrays, d_out, slots, keywords):
  """Returns out, lse and the gradients."""

  @jax.jit
  def both(arrays, d_out, slots, keywords):
    def attend(*arrays):
      return masked_attention(
        *arrays, slots, scale=SCALE, implementation=implementation, **keywords
      )

    (out, lse), pull_back = jax.vjp(attend, *arrays)
    return out, lse, *pull_back((d_out, jnp.zeros_like(lse)))

  return jax.tree.map(np.asarray, both(arrays, d_out, slots, keywords))


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow) if name == "one" else name
    for name in CASES
  ],
)
def test_value_and_gradient_equal_the_definition(name):
  problem = draw(CASES[name])
  got = run("tpu_interpret", *problem)
  want = run("ref", *problem)
  for one_got, one_want in zip(got, want, strict=True):
    assert one_got.dtype == one_want.dtype
    assert_close(one_got, one_want)


def test_bfloat16_at_the_real_widths():
  case = Case(
    queries=33,
    keys=150,
    heads=1,
    key_heads=1,
    width=192,
    value=128,
    masked=True,
  )
  problem = draw(case, jnp.bfloat16)
  got = run("tpu_interpret", *problem)
  arrays, d_out, *rest = problem
  exact = tuple(x.astype(jnp.float32) for x in arrays)
  want = run("ref", exact, d_out.astype(jnp.float32), *rest)
  assert got[1].dtype == np.float32
  assert_close(got[1], want[1])
  for index in (0, 2, 3, 4):
    assert got[index].dtype == jnp.bfloat16
    assert_close(got[index], want[index])


@pytest.mark.slow
def test_many_small_tiles_and_calls(monkeypatch):
  # Several query tiles and key tiles, and gradients of keys from two calls.
  for module in (tpu, tpu_backward):
    monkeypatch.setattr(module, "QUERIES", 16)
    monkeypatch.setattr(module, "KEYS", 128)
  monkeypatch.setattr(tpu_backward, "_D_QUERY_BYTES", 32 * 128 * 4)
  case = Case(queries=45, keys=300, heads=1, key_heads=1, segments=True)
  problem = draw(case)
  got = run("tpu_interpret", *problem)
  for one_got, one_want in zip(got, run("ref", *problem), strict=True):
    assert_close(one_got, one_want)


def test_tiles_that_no_query_needs_are_not_read(monkeypatch):
  for module in (tpu, tpu_backward):
    monkeypatch.setattr(module, "KEYS", 128)
  case = Case(queries=5, keys=384, heads=1, key_heads=1)
  arrays, d_out, slots, _ = draw(case)
  seen = np.zeros((1, 5, 384), bool)
  seen[:, :4, 3::7] = True
  seen[..., 128:256] = False
  keywords = {"mask_BTW": bitmask.pack(jnp.asarray(seen))}
  slots = np.full_like(slots, 383)
  want = run("ref", arrays, d_out, slots, keywords)
  query, key, value = arrays
  key = key.at[:, 128:256].set(jnp.nan)
  value = value.at[:, 128:256].set(jnp.nan)
  got = run("tpu_interpret", (query, key, value), d_out, slots, keywords)
  # The last query sees nothing at all.
  assert not np.any(got[0][:, 4])
  assert np.all(got[1][:, 4] == -np.inf)
  for one_got, one_want in zip(got, want, strict=True):
    assert_close(one_got, one_want)


def test_words_hold_the_bits_of_the_mask():
  batch, queries, keys = 2, 16, 5000
  rng = np.random.default_rng(3)
  seen_BTS = rng.random((batch, queries, keys)) < 0.5
  slots_BT = rng.integers(-1, keys, (batch, queries)).astype(np.int32)
  slots_BT[0, :2] = (-1, keys - 1)
  sizes = tpu_tiles.choose_sizes((batch, queries, 1, 8), keys, 256, 1024, 1)
  mask_BTW = bitmask.pack(jnp.asarray(seen_BTS))
  words_BTUJ = tpu_tiles.span_words(
    sizes,
    jnp.asarray(slots_BT),
    keys,
    (slots_BT, mask_BTW, None, None),
    pltpu.InterpretParams(),
  )
  words_BTUJ1 = np.asarray(words_BTUJ).view(np.uint32)[..., None]
  bits_BTUJN = words_BTUJ1 >> np.arange(32, dtype=np.uint32) & 1
  got_BTS = np.swapaxes(bits_BTUJN, 3, 4).reshape(batch, queries, -1)
  want_BTS = seen_BTS & (np.arange(keys) <= slots_BT[..., None])
  assert got_BTS.shape[2] == 8192
  np.testing.assert_array_equal(got_BTS[..., :keys], want_BTS)
  assert not np.any(got_BTS[..., keys:])
  kinds_RC = np.asarray(tpu_tiles.kinds(sizes, slots_BT, words_BTUJ))
  padded = np.pad(want_BTS, ((0, 0), (0, 0), (0, 120)))
  tiles_RQCS = padded.reshape(batch, queries, 5, 1024)
  np.testing.assert_array_equal(kinds_RC != 0, tiles_RQCS.any((1, 3)))
  np.testing.assert_array_equal(kinds_RC == 1, tiles_RQCS.all((1, 3)))


def test_work_lists_needed_pairs_and_empty_rows_once():
  kinds_RC = np.array([[0, 2, 1], [0, 0, 0], [1, 0, 2]], np.int32)
  work = tpu_tiles.list_work(jnp.asarray(kinds_RC))
  items = np.asarray(work.items_N)[: int(work.count)]
  rows = [tpu_tiles.row_of(items), tpu_tiles.column_of(items)]
  np.testing.assert_array_equal(rows, [[0, 0, 1, 2, 2], [1, 2, 0, 0, 2]])
  np.testing.assert_array_equal(tpu_tiles.kind_of(items), [2, 1, 0, 1, 2])
  first, last = tpu_tiles.is_first(items), tpu_tiles.is_last(items)
  np.testing.assert_array_equal(first, [True, False, True, True, False])
  np.testing.assert_array_equal(last, [False, True, True, False, True])
  with pytest.raises(ValueError, match="columns=5000"):
    tpu_tiles.list_work(jnp.zeros((1, 5000), jnp.int32))


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (37, 53), (128, 64)])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_work_is_what_a_loop_over_pairs_finds(shape, share):
  rng = np.random.default_rng(0)
  kinds_RC = rng.integers(1, 3, shape) * (rng.random(shape) < share)
  want = []
  for row, kinds_C in enumerate(kinds_RC):
    columns = np.flatnonzero(kinds_C) if kinds_C.any() else [0]
    for column in columns:
      ends = (column == columns[0]) + 2 * (column == columns[-1])
      want.append(ends + (kinds_C[column] << 2) + (column << 4) + (row << 16))
  compiled = jax.jit(tpu_tiles.list_work).lower(jnp.int32(kinds_RC)).compile()
  work = compiled(jnp.int32(kinds_RC))
  assert int(work.count) == len(want)
  items_N = np.asarray(work.items_N)
  assert len(items_N) == kinds_RC.size
  np.testing.assert_array_equal(items_N[: len(want)], want)
  assert np.all(items_N[len(want) :] == 2**31 - 1)
  assert " sort(" not in compiled.as_text()


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_kernels_lower_for_a_tpu(masked):
  def loss(query, key, value, slots, mask):
    out, _ = masked_attention(
      query,
      key,
      value,
      slots,
      scale=SCALE,
      mask_BTW=mask,
      implementation="tpu",
    )
    return jnp.sum(out.astype(jnp.float32))

  shapes = ((1, 512, 4, 192), (1, 2048, 4, 192), (1, 2048, 4, 128))
  arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
  slots = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 512, 64), jnp.uint32) if masked else None
  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
    *arrays, slots, mask
  )
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") >= 2
