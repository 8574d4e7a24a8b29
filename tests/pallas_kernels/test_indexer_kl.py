"""The KL loss against float64 numpy, its gradient by finite differences."""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# Q query width, L latent, R rope width, N selected keys

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmask
from pallas_kernels.indexer_kl import indexer_kl
from pallas_kernels.indexer_kl import indexer_kl_gathered
from pallas_kernels.indexer_kl import indexer_kl_gathered_loss
from pallas_kernels.indexer_kl import indexer_kl_loss
from tests.support.tolerances import TOLERANCE

SCALE = 0.4
IMPLEMENTATIONS = ["ref", "xla"]


def draw(shape, seed):
  values = np.random.default_rng(seed).normal(size=shape)
  return np.asarray(values.astype(np.float32))


class Problem:
  """Random arrays of the masked form, and their set of keys [B,T,S]."""

  def __init__(self, queries, keys, *, shared=False, masked=True, seed=0):
    rng = np.random.default_rng(seed)
    self.batch, self.heads = 2, 3
    self.trained = (
      draw((2, queries, 4, 8), seed + 1) * 0.5,
      draw((2, keys, 8), seed + 2) * 0.5,
      draw((2, queries, 4), seed + 3),
    )
    self.query = draw((2, queries, 3, 6), seed + 4)
    self.key = draw((2, keys, 1 if shared else 3, 6), seed + 5)
    self.slots = rng.integers(-1, keys, (2, queries)).astype(np.int32)
    self.slots[0, 0] = -1
    self.query_segments = rng.integers(0, 3, (2, queries)).astype(np.int32)
    self.key_segments = rng.integers(0, 2, (2, keys)).astype(np.int32)
    visible = np.arange(keys) <= self.slots[..., None]
    visible &= self.query_segments[..., None] == self.key_segments[:, None]
    self.mask = None
    if masked:
      mask = rng.random((2, queries, keys)) < 0.4
      visible &= mask
      self.mask = np.asarray(bitmask.pack(mask))
    self.visible = visible
    key = np.broadcast_to(self.key, (2, keys, 3, 6)).astype("f8")
    self.logits = SCALE * np.einsum("bthq,bshq->bths", self.query, key)
    self.lse = log_sum_exp(self.logits, visible[:, :, None]).astype(np.float32)

  def arguments(self):
    return self.query, self.key, self.lse, self.slots

  def keywords(self):
    return {
      "scale": SCALE,
      "mask_BTW": self.mask,
      "query_segments_BT": self.query_segments,
      "key_segments_BS": self.key_segments,
    }


def log_sum_exp(x, where):
  """Stable log-sum-exp over the last axis; -inf for an empty row."""
  x = np.where(where, x, -np.inf)
  top = np.max(x, axis=-1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0.0)
  with np.errstate(divide="ignore"):
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def numpy_kl(trained, logits, visible):
  """Equations 3 and 4 in float64; the target is built from softmaxes."""
  query, key, weight = (x.astype("f8") for x in trained)
  dot = np.maximum(np.einsum("btik,bsk->btis", query, key), 0)
  score = (dot * weight[..., None]).sum(2)
  kl = np.zeros(score.shape[:2])
  for b, t in np.ndindex(kl.shape):
    set_ = visible[b, t]
    if not set_.any():
      continue
    weights = np.exp(logits[b, t][:, set_])
    weights /= weights.sum(-1, keepdims=True)
    target = weights.sum(0) / weights.sum()
    model = score[b, t, set_] - log_sum_exp(score[b, t, set_], True)
    kl[b, t] = (target * (np.log(target) - model)).sum()
  return kl


def numpy_gradients(trained, logits, visible, cotangent):
  """Central differences of sum(cotangent * kl) in float64."""

  def loss(trained):
    return (cotangent * numpy_kl(trained, logits, visible)).sum()

  step, gradients = 1e-5, []
  trained = [x.astype("f8") for x in trained]
  for x in trained:
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
      kept = x[place]
      x[place] = kept + step
      above = loss(trained)
      x[place] = kept - step
      gradient[place] = (above - loss(trained)) / (2 * step)
      x[place] = kept
    gradients.append(gradient)
  return gradients


def close(got, want):
  rtol, atol = TOLERANCE["float32"]
  np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def value(problem, implementation):
  run = functools.partial(
    indexer_kl, **problem.keywords(), implementation=implementation
  )
  return jax.jit(run)(*problem.trained, *problem.arguments())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "queries,keys,masked,shared",
  [
    (70, 75, True, False),
    (70, 75, False, True),
    (3, 1030, False, False),
    (3, 1030, True, True),
    (1, 9, True, False),
  ],
)
def test_value(queries, keys, masked, shared, implementation):
  problem = Problem(queries, keys, shared=shared, masked=masked)
  want = numpy_kl(problem.trained, problem.logits, problem.visible)
  got = value(problem, implementation)
  close(got, want)
  empty = ~problem.visible.any(-1)
  assert empty.any()
  assert (np.asarray(got)[empty] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_equals_finite_differences(masked, implementation):
  problem = Problem(5, 7, masked=masked, seed=20)
  cotangent = draw((2, 5), 30)
  want = numpy_gradients(
    problem.trained, problem.logits, problem.visible, cotangent
  )

  def loss(*trained):
    return jnp.sum(
      cotangent
      * indexer_kl(
        *trained,
        *problem.arguments(),
        **problem.keywords(),
        implementation=implementation,
      )
    )

  def known(*trained):
    return indexer_kl_loss(
      *trained,
      *problem.arguments(),
      cotangent,
      **problem.keywords(),
      implementation=implementation,
    )

  got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*problem.trained)
  jax.tree.map(close, list(got), want)
  value_and_grad = jax.value_and_grad(known, argnums=(0, 1, 2), has_aux=True)
  (total, kl_BT), got = jax.jit(value_and_grad)(*problem.trained)
  jax.tree.map(close, list(got), want)
  want = numpy_kl(problem.trained, problem.logits, problem.visible)
  close(kl_BT, want)
  close(total, np.sum(cotangent * want))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_agree_over_several_tiles(masked):
  problem = Problem(130, 600, masked=masked, seed=40)
  cotangent = draw((2, 130), 41)

  def loss(implementation, *trained):
    return jnp.sum(
      cotangent
      * indexer_kl(
        *trained,
        *problem.arguments(),
        **problem.keywords(),
        implementation=implementation,
      )
    )

  want, got = (
    jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2)))(
      *problem.trained
    )
    for name in IMPLEMENTATIONS
  )
  jax.tree.map(close, got, want)


def test_constants_get_no_gradient():
  problem = Problem(5, 7)

  def loss(query, key, lse):
    return jnp.sum(
      indexer_kl(
        *problem.trained, query, key, lse, problem.slots, **problem.keywords()
      )
    )

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
    *problem.arguments()[:3]
  )
  for gradient in gradients:
    assert (np.asarray(gradient) == 0).all()


def test_empty_rows_and_bfloat16_have_finite_gradients():
  problem = Problem(4, 6, seed=50)
  problem.slots[...] = -1
  trained = [jnp.asarray(x, jnp.bfloat16) for x in problem.trained]
  problem.lse[...] = -np.inf

  def loss(*trained):
    return jnp.sum(
      indexer_kl(*trained, *problem.arguments(), **problem.keywords())
    )

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*trained)
  for gradient in gradients:
    assert gradient.dtype == jnp.bfloat16
    assert (np.asarray(gradient, np.float32) == 0).all()


def gathered_problem(queries, keys, selected, seed=60):
  """Returns (trained, arguments, logits [B,T,H,S], visible [B,T,S])."""
  rng = np.random.default_rng(seed)
  trained = (
    draw((2, queries, 4, 8), seed + 1) * 0.5,
    draw((2, keys, 8), seed + 2) * 0.5,
    draw((2, queries, 4), seed + 3),
  )
  query_latent, query_rope = (
    draw((2, queries, 3, 10), seed + 4),
    draw((2, queries, 3, 4), seed + 5),
  )
  latent, rope = draw((2, keys, 10), seed + 6), draw((2, keys, 4), seed + 7)
  indices = np.full((2, queries, selected), -1, np.int32)
  visible = np.zeros((2, queries, keys), bool)
  for b, t in np.ndindex(2, queries):
    count = rng.integers(0, min(selected, keys) + 1)
    chosen = rng.permutation(keys)[:count]
    indices[b, t, :count] = chosen
    visible[b, t, chosen] = True
  indices[0, 0], visible[0, 0] = -1, False
  logits = SCALE * (
    np.einsum("bthc,bsc->bths", query_latent, latent.astype("f8"))
    + np.einsum("bthr,bsr->bths", query_rope, rope.astype("f8"))
  )
  lse = log_sum_exp(logits, visible[:, :, None]).astype(np.float32)
  arguments = (query_latent, query_rope, latent, rope, lse, indices)
  return trained, arguments, logits, visible


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries,keys,selected", [(37, 50, 9), (1, 4, 6)])
def test_gathered_value(queries, keys, selected, implementation):
  trained, arguments, logits, visible = gathered_problem(
    queries, keys, selected
  )
  run = functools.partial(
    indexer_kl_gathered, scale=SCALE, implementation=implementation
  )
  close(jax.jit(run)(*trained, *arguments), numpy_kl(trained, logits, visible))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gathered_gradient_equals_finite_differences(implementation):
  trained, arguments, logits, visible = gathered_problem(5, 7, 4)
  cotangent = draw((2, 5), 70)
  want = numpy_gradients(trained, logits, visible, cotangent)
  keywords = {"scale": SCALE, "implementation": implementation}

  def loss(*trained):
    return jnp.sum(
      cotangent * indexer_kl_gathered(*trained, *arguments, **keywords)
    )

  def known(*trained):
    return indexer_kl_gathered_loss(
      *trained, *arguments, cotangent, **keywords
    )[0]

  for function in (loss, known):
    got = jax.jit(jax.grad(function, argnums=(0, 1, 2)))(*trained)
    jax.tree.map(close, list(got), want)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "tpu_interpret"])
def test_nan_of_the_attention_is_no_perfect_kl(implementation):
  problem = Problem(6, 9)
  row = np.argwhere(problem.visible.any(-1))[0]
  problem.lse[*row, 1] = np.nan
  found_BT = np.isnan(value(problem, implementation))
  assert found_BT[*row] and found_BT.sum() == 1


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "tpu_interpret"])
def test_nan_of_the_gathered_attention_is_no_perfect_kl(implementation):
  trained, arguments, _, visible = gathered_problem(6, 9, 4)
  row = np.argwhere(visible.any(-1))[0]
  arguments[4][*row, 1] = np.nan
  kl_BT = indexer_kl_gathered(
    *trained, *arguments, scale=SCALE, implementation=implementation
  )
  found_BT = np.isnan(kl_BT)
  assert found_BT[*row] and found_BT.sum() == 1


def test_wrong_arguments_are_named():
  problem = Problem(3, 5)
  query, key, lse, slots = problem.arguments()
  with pytest.raises(ValueError, match="lse_BTH has shape"):
    indexer_kl(*problem.trained, query, key, lse[:, :1], slots, scale=1.0)
  with pytest.raises(ValueError, match="key_BSGQ has shape"):
    indexer_kl(*problem.trained, query, key[:, :, :2], lse, slots, scale=1.0)
  with pytest.raises(ValueError, match="implementation='cuda'"):
    indexer_kl(
      *problem.trained,
      *problem.arguments(),
      **problem.keywords(),
      implementation="cuda",
    )
