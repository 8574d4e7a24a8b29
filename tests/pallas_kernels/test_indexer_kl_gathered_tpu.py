"""The gathered KL's TPU kernels in the TPU interpreter, against `ref`."""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# C latent, R rope width, N selected

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations
from pallas_kernels.indexer_kl import gathered_tpu
from pallas_kernels.indexer_kl import gathered_tpu_gradient
from pallas_kernels.indexer_kl import indexer_kl_gathered_loss
from pallas_kernels.indexer_kl import ref
from pallas_kernels.sparse_mla import tpu_rows
from pallas_kernels.sparse_mla import tpu_segments

SCALE = 0.4
# batch, queries, keys, index heads, index width, heads, latent, rope, selected
ODD = (2, 3, 50, 3, 12, 3, 300, 6, 30)


def draw_problem(sizes, dtype, seed=0):
  """Returns (trained, constants): ragged lists, keys shared by queries."""
  (
    batch,
    queries,
    keys,
    index_heads,
    index_width,
    heads,
    latent,
    rope,
    selected,
  ) = sizes
  rng = np.random.default_rng(seed)
  normal = lambda size, *shape: jnp.asarray(
    size * rng.normal(size=(batch, *shape)), dtype
  )
  trained = (
    normal(0.5, queries, index_heads, index_width),
    normal(0.5, keys, index_width),
    normal(1.0, queries, index_heads),
  )
  size = (latent + rope) ** -0.25
  attention = (
    normal(size, queries, heads, latent),
    normal(size, queries, heads, rope),
    normal(size, keys, latent),
    normal(size, keys, rope),
  )
  indices = np.full((batch, queries, selected), -1, np.int32)
  for b, t in np.ndindex(batch, queries):
    count = max(0, min(keys, selected) - 7 * t)
    places = rng.permutation(selected)[:count]
    indices[b, t, places] = rng.permutation(keys)[:count]
  indices[0, 1] = -1
  lse = log_sum_exp(*attention, indices)
  return trained, (*attention, lse, indices)


def log_sum_exp(query_BTHC, query_BTHR, latent_BSC, rope_BSR, indices_BTN):
  """Returns [B,T,H] float32; the last head of all counts for nothing."""
  wide = [np.float32(x) for x in (query_BTHC, query_BTHR, latent_BSC, rope_BSR)]
  logits_BTHS = SCALE * (
    np.einsum("bthc,bsc->bths", wide[0], wide[2])
    + np.einsum("bthr,bsr->bths", wide[1], wide[3])
  )
  listed_BTS = np.zeros((*indices_BTN.shape[:2], latent_BSC.shape[1] + 1), bool)
  np.put_along_axis(listed_BTS, indices_BTN, True, axis=2)
  listed_BTS = listed_BTS[..., None, :-1]
  logits_BTHS = jnp.where(listed_BTS, logits_BTHS, -jnp.inf)
  lse_BTH = jax.nn.logsumexp(logits_BTHS, axis=-1)
  return lse_BTH.at[..., -1].set(-jnp.inf)


def token_weight(constants):
  shape = constants[-1].shape[:2]
  return np.linspace(-1, 2, np.prod(shape), dtype=np.float32).reshape(shape)


def through_the_front(problem, implementation):
  """Returns (sum of weighted KL, kl_BT, gradients of the trained arrays)."""
  trained, constants = problem
  run = functools.partial(
    indexer_kl_gathered_loss, scale=SCALE, implementation=implementation
  )
  graded = jax.value_and_grad(
    lambda *trained: run(*trained, *constants, token_weight(constants)),
    argnums=(0, 1, 2),
    has_aux=True,
  )
  (total, kl_BT), gradients = jax.jit(graded)(*trained)
  return total, kl_BT, *gradients


def directly(problem, chip):
  """Returns kl_BT and gradients of the kernels as if on a given chip."""
  kl_BT, gradients = gathered_tpu.evaluate(
    SCALE,
    *problem,
    token_weight(problem[1]),
    interpret=implementations.INTERPRET,
    chip=chip,
  )
  return kl_BT, *gradients


def wanted(problem):
  """Returns kl_BT and gradients by the definition, in float32."""
  trained, constants = problem
  wide = [x.astype(jnp.float32) for x in trained]
  kl_BT, pull_back = jax.vjp(
    lambda *x: ref.indexer_kl_gathered(*x, *constants, scale=SCALE), *wide
  )
  return kl_BT, *pull_back(token_weight(constants))


def compare(wants, gots, relative):
  """Asserts that each differs by at most a share of its largest value."""
  for want, got in zip(wants, gots, strict=True):
    want, got = np.float32(want), np.float32(got)
    assert np.abs(got - want).max() <= relative * np.abs(want).max()


@pytest.mark.parametrize(
  "dtype,relative", [("float32", 1e-5), ("bfloat16", 1e-2)]
)
def test_equals_the_definition(dtype, relative):
  problem = draw_problem(ODD, dtype)
  total, kl_BT, *gradients = through_the_front(problem, "tpu_interpret")
  want_BT, *wants = wanted(problem)
  compare((want_BT, *wants), (kl_BT, *gradients), relative)
  weight_BT = token_weight(problem[1])
  np.testing.assert_allclose(total, np.sum(weight_BT * want_BT), rtol=relative)
  assert kl_BT[0, 1] == 0.0
  assert all(g.dtype == dtype for g in gradients)
  assert np.all(np.float32(gradients[0][0, 1]) == 0.0)


@pytest.mark.slow
def test_values_alone_are_the_same():
  problem = draw_problem(ODD, "bfloat16")
  want_BT = wanted(problem)[0]
  kl_BT, gradients = gathered_tpu.evaluate(
    SCALE, *problem, None, interpret=implementations.INTERPRET
  )
  assert gradients is None
  compare([want_BT], [kl_BT], 1e-4)


@pytest.mark.parametrize(
  "dtype,relative",
  [
    pytest.param("float32", 1e-5, marks=pytest.mark.slow),
    ("bfloat16", 1e-2),
  ],
)
def test_segments_of_keys_equal_the_definition(monkeypatch, dtype, relative):
  # Three segments of 40 keys, lists of up to two items in a segment.
  monkeypatch.setattr(tpu_segments, "ITEM", 32)
  monkeypatch.setattr(tpu_segments, "ITEMS", 2)
  # Batches of additions in turns, as with the large pieces of real sizes.
  monkeypatch.setattr(gathered_tpu_gradient, "_ADDITIONS", 4)
  problem = draw_problem((1, 3, 115, 3, 16, 3, 40, 6, 60), dtype)
  rng = np.random.default_rng(1)
  indices = problem[1][-1]
  indices[0, 2] = -1
  indices[0, 2, 5:43] = rng.permutation(40)[:38]
  attention = problem[1][:4]
  constants = (*attention, log_sum_exp(*attention, indices), indices)
  problem = problem[0], constants
  words = {"float32": 4, "bfloat16": 2}[dtype]
  chip = tpu_rows.Chip(forward_keys=-(-40 * words // 3), pairs=True)
  compare(wanted(problem), directly(problem, chip), relative)


@pytest.mark.slow
def test_chunks_of_queries_equal_the_definition(monkeypatch):
  monkeypatch.setattr(gathered_tpu, "_QUERIES", 2)
  problem = draw_problem((1, 3, 20, 2, 8, 2, 16, 4, 25), "bfloat16")
  compare(wanted(problem), directly(problem, tpu_rows.Chip()), 1e-2)


def test_wide_keys_are_refused():
  problem = draw_problem((1, 2, 9, 2, 129, 2, 16, 4, 5), "float32")
  with pytest.raises(ValueError, match="width=129 must be at most 128"):
    through_the_front(problem, "tpu")
