"""Values of the kernels for Hopper, in an interpreter: no GPU runs here."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels import gpu_tiles
from pallas_kernels.index_select import gpu as index_gpu
from pallas_kernels.index_select import gpu_search
from pallas_kernels.index_select import order
from pallas_kernels.index_select import ref as index_ref
from pallas_kernels.masked_attention import gpu as masked_gpu
from pallas_kernels.masked_attention import gpu_backward as masked_backward
from pallas_kernels.masked_attention import gpu_lists
from pallas_kernels.masked_attention import ref as masked_ref
from pallas_kernels.sparse_mla import gpu as sparse_gpu
from pallas_kernels.sparse_mla import gpu_backward as sparse_backward
from pallas_kernels.sparse_mla import gpu_gather
from pallas_kernels.sparse_mla import ref as sparse_ref
from tests.support.mosaic_gpu import assert_close
from tests.support.mosaic_gpu import interpreted
from tests.support.mosaic_gpu import interpreter

# Long enough to leave to `make test-all`.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def normal(seed, *shape, dtype=jnp.bfloat16):
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32).astype(dtype)


def integers(seed, low, high, *shape):
  values = np.random.default_rng(seed).integers(low, high, size=shape)
  return jnp.asarray(values, jnp.int32)


def index_inputs(dtype, batch, queries, heads, width, keys):
  query_BTIK = normal(0, batch, queries, heads, width, dtype=dtype)
  key_BSK = normal(1, batch, keys, width, dtype=dtype)
  weight_BTI = normal(2, batch, queries, heads, dtype=jnp.float32)
  slots_BT = jnp.sort(integers(3, -1, keys, batch, queries), axis=1)
  return query_BTIK, key_BSK, weight_BTI, slots_BT


@interpreted
@pytest.mark.parametrize("dtype", [slow(jnp.bfloat16), jnp.float8_e4m3fn])
def test_index_scores(dtype):
  keys = 2 * index_gpu.TILE
  query_BTIK, key_BSK, weight_BTI, _ = index_inputs(dtype, 1, 4, 64, 128, keys)
  last = [0, index_gpu.TILE, -1, keys - 1]
  score_CP = index_gpu.scores(
    query_BTIK[0],
    key_BSK[0],
    weight_BTI[0],
    jnp.array(last, jnp.int32),
    interpret=interpreter(),
  )
  query, key, weight = (
    np.asarray(x[0], np.float64) for x in (query_BTIK, key_BSK, weight_BTI)
  )
  dot = np.maximum(np.einsum("cik,pk->cip", query, key), 0.0)
  expected = np.einsum("cip,ci->cp", dot, weight)
  for own, other, end in zip(score_CP, expected, last, strict=True):
    assert_close(own[: end + 1], other[: end + 1], "float32")


@interpreted
@pytest.mark.parametrize("segments", [slow(False), True])
def test_index_select(segments):
  batch, queries, keys, top_k = 2, 5, 300, 7
  arrays = index_inputs(jnp.bfloat16, batch, queries, 3, 40, keys)
  extra = (None, None, None)
  if segments:
    extra = (
      jnp.zeros((batch, queries), jnp.int32),
      integers(4, 0, 2, batch, keys),
      normal(5, batch, keys, dtype=jnp.float32) ** 2 + 0.5,
    )
  wanted = dict(top_k=top_k, want_mask=True, want_indices=True)
  own = index_gpu.select(*arrays, *extra, **wanted, interpret=interpreter())
  expected = index_ref.select(*arrays, *extra, **wanted)
  np.testing.assert_array_equal(own[0], expected[0])
  np.testing.assert_array_equal(own[1], expected[1])
  for actual, wished in zip(own[2:4], expected[2:4], strict=True):
    assert_close(actual, wished, "float32")
  np.testing.assert_array_equal(own[4], expected[4])


@interpreted
@pytest.mark.parametrize("top_k", [slow(1), 40, slow(600)])
def test_search(top_k):
  score = np.random.default_rng(0).normal(size=(5, 515)).astype(np.float32)
  score[1, ::3] = 0.5
  score[2, 7] = np.nan
  ordered_CP = order.encode(jnp.asarray(score))
  ordered_CP = ordered_CP.at[3, 20:].set(order.HIDDEN)
  ordered_CP = ordered_CP.at[4].set(order.HIDDEN)
  cut = gpu_search.best(ordered_CP, top_k, interpret=interpreter())
  selected = cut.holds(ordered_CP, jnp.arange(515))
  np.testing.assert_array_equal(cut.invalid_C, [0, 0, 1, 0, 0])
  for row, (own, keys) in enumerate(zip(selected, ordered_CP, strict=True)):
    # Best first, equal ones by index: a stable sort of the negated keys.
    best = np.argsort(-np.asarray(keys, np.int64), kind="stable")
    best = best[keys[best] > order.HIDDEN][:top_k]
    expected = [] if row == 2 else sorted(best)
    np.testing.assert_array_equal(np.flatnonzero(own), expected)


def test_search_of_long_rows(monkeypatch):
  keys, top_k = 515, 5
  monkeypatch.setattr(gpu_search, "MAX_KEYS", 512)
  score = np.random.default_rng(0).normal(size=(2, keys)).astype(np.float32)
  ordered_CP = order.encode(jnp.asarray(score))
  cut = gpu_search.best(ordered_CP, top_k)
  selected = np.asarray(cut.holds(ordered_CP, jnp.arange(keys)))
  for own, row in zip(selected, score, strict=True):
    best = np.sort(np.argsort(-row, kind="stable")[:top_k])
    np.testing.assert_array_equal(np.flatnonzero(own), best)


def test_index_select_refuses_other_inputs():
  wanted = dict(top_k=1, want_mask=True, want_indices=False)
  arrays = index_inputs(jnp.float32, 1, 2, 3, 40, 5)
  with pytest.raises(ValueError, match="bfloat16"):
    index_gpu.select(*arrays, None, None, None, **wanted)
  arrays = index_inputs(jnp.bfloat16, 1, 2, 65, 40, 5)
  with pytest.raises(ValueError, match="HEADS"):
    index_gpu.select(*arrays, None, None, None, **wanted)


def sparse_inputs(batch, queries, heads, latent, rope, keys, selected):
  indices_BTN = integers(4, -1, keys, batch, queries, selected)
  indices_BTN = indices_BTN.at[0, 0].set(-1)
  indices_BTN = indices_BTN.at[:, -1, gpu_gather.ROWS :].set(-1)
  return (
    normal(0, batch, queries, heads, latent),
    normal(1, batch, queries, heads, rope),
    normal(2, batch, keys, latent),
    normal(3, batch, keys, rope),
    indices_BTN,
  )


@interpreted
@pytest.mark.parametrize(
  "sizes", [(2, 3, 3, 128, 64, 50, 150), slow((1, 1, 65, 512, 64, 40, 70))]
)
def test_sparse_mla(sizes):
  arrays = sparse_inputs(*sizes)
  out, lse = sparse_gpu.forward(*arrays, 0.1, interpret=interpreter())
  expected_out, expected_lse = sparse_ref.forward(*arrays, 0.1)
  assert out.dtype == expected_out.dtype
  assert_close(out, expected_out)
  assert_close(lse, expected_lse, "float32")


@interpreted
@pytest.mark.parametrize(
  "sizes",
  [
    (2, 3, 3, 128, 64, 50, 150),
    slow((1, 2, 65, 512, 64, 40, 70)),
  ],
)
def test_sparse_mla_backward(sizes):
  arrays = sparse_inputs(*sizes)
  out, lse = sparse_ref.forward(*arrays, 0.1)
  rest = (0.1, out, lse, normal(5, *out.shape))
  own = sparse_backward.backward(*arrays, *rest, interpret=interpreter())
  expected = sparse_ref.backward(*arrays, *rest)
  for actual, wished in zip(own, expected, strict=True):
    assert actual.dtype == wished.dtype
    assert_close(actual, wished)


@pytest.mark.parametrize("selected", [0, 3, gpu_gather.ROWS, 70])
def test_listed_rows_count_through_the_batch(selected):
  batch, queries, keys = 2, 3, 11
  indices_BTN = integers(0, -1, keys, batch, queries, selected)
  indices_BTN = indices_BTN.at[0, 1].set(-1)
  rows_YN, blocks_Y = sparse_gpu.list_rows(indices_BTN, keys)
  assert rows_YN.shape[1] % gpu_gather.ROWS == 0
  assert rows_YN.shape[1] > 0
  for row in range(batch):
    for query in range(queries):
      own, listed = row * queries + query, np.asarray(indices_BTN[row, query])
      expected = np.where(listed < 0, -1, listed + row * keys)
      np.testing.assert_array_equal(rows_YN[own, :selected], expected)
      np.testing.assert_array_equal(rows_YN[own, selected:], -1)
      last = max(np.flatnonzero(listed >= 0), default=-1)
      assert blocks_Y[own] == last // gpu_gather.ROWS + 1


def test_sums_of_all_threads_cover_a_product():
  rows, columns = gpu_gather.ROWS, 64
  covered = np.zeros((rows, columns), int)
  for thread in range(gpu_gather.THREADS):
    row, first = gpu_gather.sum_place(thread)
    # A lane of a product holds two columns of two rows, 8 apart.
    lane, upper = thread % 32, 16 * (thread // 32) + thread % 32 // 4
    neighbour = lane ^ 1
    held = [2 * (x % 4) for x in sorted((lane, neighbour))]
    assert row in (upper, upper + 8)
    assert first == held[0]
    assert held[1] == first + 2
    for start in range(first, columns, 8):
      covered[row, start : start + 4] += 1
  np.testing.assert_array_equal(covered, 1)


def test_rows_go_where_a_swizzled_copy_puts_them():
  rows, width = gpu_gather.ROWS, 9 * gpu_gather.COLUMNS
  # Row tiles, column tiles, rows and columns of 8 values (16 bytes) in a tile.
  value = np.arange(rows * width).reshape(8, 8, 9, 8, 8)
  tiles = value.transpose(0, 2, 1, 3, 4)
  expected = np.empty_like(tiles)
  for row in range(8):
    for lane in range(8):
      expected[:, :, row, lane ^ row] = tiles[:, :, row, lane]
  written = np.full(rows * width, -1)
  for row in range(rows):
    for piece in range(9):
      for lane in range(8):
        start = gpu_gather.offset(row, piece, lane, 9) // 2
        source = row * width + piece * 64 + lane * 8
        written[start : start + 8] = np.arange(source, source + 8)
  np.testing.assert_array_equal(written, expected.reshape(-1))


def test_sparse_mla_refuses_other_inputs():
  arrays = sparse_inputs(1, 2, 3, 128, 64, 5, 4)
  with pytest.raises(ValueError, match="bfloat16"):
    sparse_gpu.forward(arrays[0].astype(jnp.float32), *arrays[1:], 0.1)
  with pytest.raises(ValueError, match="multiple of 128"):
    sparse_gpu.forward(*sparse_inputs(1, 2, 3, 64, 64, 5, 4), 0.1)


def masked_inputs(batch, queries, heads, key_heads, widths, keys):
  width, value_width = widths
  return (
    normal(0, batch, queries, heads, width),
    normal(1, batch, keys, key_heads, width),
    normal(2, batch, keys, key_heads, value_width),
  )


def visible(batch, queries, keys, *, mask, segments):
  slots_BT = jnp.sort(integers(3, -1, keys, batch, queries), axis=1)
  mask_BTW = query_segments_BT = key_segments_BS = None
  if mask:
    some = np.random.default_rng(4).random((batch, queries, keys)) < 0.3
    mask_BTW = bitmask.pack(jnp.asarray(some))
  if segments:
    query_segments_BT = jnp.sort(integers(5, 0, 3, batch, queries), axis=1)
    key_segments_BS = jnp.sort(integers(6, 0, 3, batch, keys), axis=1)
  return slots_BT, mask_BTW, query_segments_BT, key_segments_BS


@interpreted
@pytest.mark.parametrize(
  ("sizes", "mask"),
  [
    ((1, 200, 1, 1, (128, 64), 300), True),
    slow((2, 70, 2, 2, (64, 128), 130), False),
    slow((1, 65, 2, 1, (192, 128), 100), True),
    ((1, 3, 1, 1, (256, 256), 70), False),
  ],
)
def test_masked_attention(sizes, mask):
  arrays = masked_inputs(*sizes)
  sees = visible(*sizes[:2], sizes[-1], mask=mask, segments=mask)
  out, lse = masked_gpu.forward(*arrays, sees, 0.1, interpret=interpreter())
  expected_out, expected_lse = masked_ref.forward(*arrays, sees, 0.1)
  assert out.dtype == expected_out.dtype
  assert_close(out, expected_out)
  assert_close(lse, expected_lse, "float32")


@interpreted
@pytest.mark.parametrize(
  ("sizes", "mask"),
  [
    slow((1, 200, 2, 1, (128, 64), 300), True),
    ((2, 70, 2, 1, (64, 64), 130), True),
    slow((2, 70, 2, 2, (64, 128), 130), False),
    slow((1, 65, 2, 2, (192, 128), 200), True),
  ],
)
def test_masked_attention_backward(sizes, mask):
  arrays = masked_inputs(*sizes)
  sees = visible(*sizes[:2], sizes[-1], mask=mask, segments=mask)
  out, lse = masked_ref.forward(*arrays, sees, 0.1)
  rest = (sees, 0.1, out, lse, normal(7, *out.shape))
  own = masked_backward.backward(*arrays, *rest, interpret=interpreter())
  expected = masked_ref.backward(*arrays, *rest)
  for actual, wished in zip(own, expected, strict=True):
    assert actual.dtype == wished.dtype
    assert_close(actual, wished)


def test_listed_tiles_are_those_that_somebody_sees():
  batch, queries, keys, tile = 2, 256, 640, 128
  sees = visible(batch, queries, keys, mask=True, segments=True)
  words_BWT = gpu_lists.visible_words(*sees, keys)
  tiles_BMN, count_BM = gpu_lists.list_tiles(words_BWT, tile, masked_gpu.BLOCK)
  mask = np.zeros((batch, queries, keys), bool)
  words = np.asarray(words_BWT).view(np.uint32)
  for key in range(keys):
    mask[:, :, key] = (words[:, key // 32] >> (key % 32)) & 1
  causal = np.arange(keys) <= np.asarray(sees[0])[..., None]
  same = np.asarray(sees[2])[..., None] == np.asarray(sees[3])[:, None]
  chosen = np.asarray(bitmask.unpack(sees[1], keys))
  np.testing.assert_array_equal(mask, causal & same & chosen)
  for row in range(batch):
    for block in range(queries // masked_gpu.BLOCK):
      own = mask[row, block * masked_gpu.BLOCK :][: masked_gpu.BLOCK]
      seen = np.flatnonzero(own.reshape(-1, keys // tile, tile).any((0, 2)))
      assert count_BM[row, block] == len(seen)
      np.testing.assert_array_equal(tiles_BMN[row, block, : len(seen)], seen)


def test_register_shares_fit_what_a_block_starts_with():
  # 65536 registers: 168 for each of 384 threads, 96 for each of 640.
  assert gpu_tiles.register_shares(240, 240, 24) == (240, 240, 24)
  with pytest.raises(ValueError, match="fit"):
    gpu_tiles.register_shares(240, 240, 32)
  with pytest.raises(ValueError, match="fit"):
    gpu_tiles.register_shares(112, 112, 112, 112, 40)
  with pytest.raises(ValueError, match="multiples"):
    gpu_tiles.register_shares(100, 100, 20)


def test_masked_attention_refuses_other_inputs():
  sees = visible(1, 2, 3, mask=False, segments=False)
  arrays = masked_inputs(1, 2, 1, 1, (64, 64), 3)
  with pytest.raises(ValueError, match="bfloat16"):
    masked_gpu.forward(arrays[0].astype(jnp.float32), *arrays[1:], sees, 0.1)
  arrays = masked_inputs(1, 2, 1, 1, (576, 512), 3)
  with pytest.raises(ValueError, match="multiple of 64"):
    masked_gpu.forward(*arrays, sees, 0.1)
