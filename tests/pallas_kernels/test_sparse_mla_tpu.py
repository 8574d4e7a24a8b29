"""The TPU kernels of gathered attention in the interpreter, against `ref`."""
# B batch, T queries, S keys, H heads, C latent width, R rope width, N selected

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations
from pallas_kernels import roofline
from pallas_kernels.sparse_mla import ref
from pallas_kernels.sparse_mla import sparse_mla
from pallas_kernels.sparse_mla import tpu
from pallas_kernels.sparse_mla import tpu_backward
from pallas_kernels.sparse_mla import tpu_rows as rows
from pallas_kernels.sparse_mla import tpu_segments
from tests.support.tolerances import assert_close

SCALE = 0.3
# batch, queries, keys, heads, latent, rope, selected
ODD = (2, 3, 50, 3, 300, 6, 30)


def draw(sizes, seed=0):
  """Returns bfloat16 arrays, ragged indices and a cotangent."""
  batch, queries, keys, heads, latent, rope, selected = sizes
  rng = np.random.default_rng(seed)
  shapes = (
    (batch, queries, heads, latent),
    (batch, queries, heads, rope),
    (batch, keys, latent),
    (batch, keys, rope),
  )
  normal = lambda shape, size: jnp.asarray(
    size * rng.normal(size=shape), jnp.bfloat16
  )
  size = (latent + rope) ** -0.25
  arrays = tuple(normal(shape, size) for shape in shapes)
  indices = np.full((batch, queries, selected), -1, np.int32)
  for b, t in np.ndindex(batch, queries):
    count = min(keys, selected) - 7 * t
    places = rng.permutation(selected)[:count]
    indices[b, t, places] = rng.permutation(keys)[:count]
  indices[0, 1] = -1
  return arrays, indices, normal(shapes[0], 0.3)


def gradients(implementation, arrays, indices, d_out):
  """Returns out, lse and four gradients through the front."""

  def attend(*arrays):
    return sparse_mla(
      *arrays, indices, scale=SCALE, implementation=implementation
    )

  (out, lse), pull_back = jax.vjp(attend, *arrays)
  return out, lse, *pull_back((d_out, jnp.zeros_like(lse)))


def wanted(arrays, indices, d_out):
  """Returns the same from the definition in float32."""
  wide = [a.astype(jnp.float32) for a in arrays]
  out, lse = ref.forward(*wide, indices, SCALE)
  return (
    out,
    lse,
    *ref.backward(*wide, indices, SCALE, None, None, d_out.astype(jnp.float32)),
  )


def compare(arrays, indices, d_out):
  got = gradients("tpu_interpret", arrays, indices, d_out)
  for one_got, one_want in zip(got, wanted(arrays, indices, d_out)):
    assert_close(one_got, one_want, "bfloat16")
  return got


def test_values_and_gradients_equal_the_definition():
  out, lse, *d_arrays = compare(*draw(ODD))
  assert out.dtype == jnp.bfloat16
  assert lse.dtype == jnp.float32
  assert np.all(np.isneginf(lse[0, 1]))
  assert np.all(np.asarray(out[0, 1], np.float32) == 0.0)
  assert all(d_array.dtype == jnp.bfloat16 for d_array in d_arrays)


@pytest.mark.slow
def test_a_key_listed_often_counts_as_often():
  arrays, indices, d_out = draw((1, 2, 30, 2, 32, 4, 32))
  # So many copies fall into the same batches of row additions.
  indices[0, 1, :20] = 5
  indices[0, 1, 20:24] = [0, 1, 1, 29]
  compare(arrays, indices, d_out)


@pytest.mark.slow
def test_segments_of_keys_equal_the_definition(monkeypatch):
  # Three segments of 40 keys, two items of 16 in a list, two chunks of queries.
  monkeypatch.setattr(tpu_segments, "ITEM", 32)
  monkeypatch.setattr(tpu_segments, "ITEMS", 2)
  arrays, indices, d_out = draw((5, 3, 115, 3, 40, 6, 60))
  rng = np.random.default_rng(1)
  indices[:, 1] = rng.integers(0, 40, indices.shape[2])
  # The first chunk of a sequence may select in few segments, or none.
  ranges = ((0, 115), (0, 30), (85, 115), (45, 75), (0, 0))
  for indices_TN, (first, end) in zip(indices, ranges):
    chosen = (indices_TN[:2] >= first) & (indices_TN[:2] < end)
    indices_TN[:2] = np.where(chosen, indices_TN[:2], -1)
  chip = rows.Chip(
    forward_keys=40, backward_keys=40, pairs=True, additions=8, queries=2
  )
  how = {"interpret": implementations.INTERPRET, "chip": chip}
  out, lse = tpu.forward(*arrays, indices, SCALE, **how)
  d_arrays = tpu_backward.backward(
    *arrays, indices, SCALE, out, lse, d_out, **how
  )
  want = wanted(arrays, indices, d_out)
  for one_got, one_want in zip((out, lse, *d_arrays), want):
    assert_close(one_got, one_want, "bfloat16")


def test_all_segments_but_the_last_are_full():
  assert tpu_segments.split(115, 43) == (3, 40)
  assert tpu_segments.split(32768, 12800) == (3, 12800)
  assert tpu_segments.split(131072, 32768) == (4, 32768)


def test_lists_that_are_sorted_already_are_cut_alike():
  indices = draw((1, 5, 115, 3, 40, 6, 60))[1][0]
  last = np.iinfo(np.int32).max
  ordered = np.sort(np.where(indices < 0, last, indices), axis=-1)
  ordered = np.where(ordered == last, -1, ordered)
  assert not np.array_equal(indices, ordered)
  cut = [
    tpu_segments.cut_lists(lists, 3, 40, 2, 512, is_sorted)
    for lists, is_sorted in ((indices, False), (ordered, True))
  ]
  assert np.any(cut[0].used_TM)
  for name in ("offsets", "meta"):
    np.testing.assert_array_equal(*(getattr(c.plan, name) for c in cut))
  np.testing.assert_array_equal(*(c.item_TM for c in cut))
  np.testing.assert_array_equal(*(c.used_TM for c in cut))


@pytest.mark.parametrize("pairs", [False, True])
def test_all_gathers_copy_the_listed_rows(pairs):
  words, keys, selected = 3, 9, 16
  rng = np.random.default_rng(0)
  size = rows.round_up(rows.FRONT + words * keys + 8, 8)
  table = rng.integers(0, 2**30, (size, rows.LANES)).astype(np.int32)
  key_N = rng.integers(0, keys, selected)
  key_N[[1, 3]] = [0, keys - 1]
  list_1N = jnp.asarray(rows.FRONT + words * key_N, jnp.int32)[None]
  if pairs:
    list_1N = rows.pair_lists(list_1N, words)
  place_NW = rows.FRONT + words * key_N[:, None] + np.arange(words)
  copies = (
    rows.gather_pairs if pairs else rows.gather,
    functools.partial(rows.gather_loop, pairs),
  )
  for copy in copies:

    def kernel(list_ref, table_ref, out_ref, copy=copy):
      copy(table_ref, list_ref, out_ref, words, 0, selected)

    shape = jax.ShapeDtypeStruct((words * selected, rows.LANES), jnp.int32)
    got = pl.pallas_call(kernel, out_shape=shape, interpret=True)(
      list_1N, table
    )
    np.testing.assert_array_equal(got, table[place_NW.reshape(-1)])


@pytest.mark.parametrize("generation", list(roofline.MXU))
def test_every_name_of_a_generation_is_one_chip(generation):
  kinds = roofline.device(generation).kinds
  chips = {rows.chip_of(kind) for kind in kinds}
  assert len(chips) == 1
  # Half the vector memory holds half the keys.
  small = chips == {rows.chip_of("TPU v5p")} or generation == "7x"
  assert (chips.pop().forward_keys == 32768) == small


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 3070"])
def test_what_is_no_tpu_is_taken_for_a_v5p(kind):
  assert rows.chip_of(kind) == rows.chip_of("TPU v5p") == rows.Chip()


def test_other_dtypes_are_refused():
  arrays, indices, _ = draw(ODD)
  wide = [a.astype(jnp.float32) for a in arrays]
  with pytest.raises(ValueError, match="must be bfloat16"):
    sparse_mla(*wide, indices, scale=SCALE, implementation="tpu")
