"""The routed experts against float64 numpy, whatever the routing."""
# T tokens, A experts a token, E experts, D model width, F expert width

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_ffn import expert_ffn
from tests.support.tolerances import assert_close

IMPLEMENTATIONS = ["ref", "xla", "ragged", "tpu_interpret"]
# tokens, experts a token, experts, model width, expert width
SIZES = {
  "odd": (37, 3, 5, 7, 6),
  "decode": (1, 4, 16, 8, 5),
  "decode_batch": (4, 2, 7, 8, 5),
  "blocks": (400, 2, 3, 8, 8),
  "one_expert": (5, 1, 1, 4, 3),
}


def draw(sizes, seed=0):
  """Returns x, weights and matrices, random distinct experts, a cotangent."""
  tokens, chosen, experts, width, hidden = sizes
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(tokens, width))
  weights = rng.random((tokens, chosen))
  gate = rng.normal(size=(experts, width, hidden)) / np.sqrt(width)
  up = rng.normal(size=(experts, width, hidden)) / np.sqrt(width)
  down = rng.normal(size=(experts, hidden, width)) / np.sqrt(hidden)
  ids = np.argsort(rng.random((tokens, experts)), axis=-1)[:, :chosen]
  d_out = rng.normal(size=(tokens, width)) / np.sqrt(tokens)
  floats = (x, weights, gate, up, down, d_out)
  *inputs, d_out = (a.astype(np.float32) for a in floats)
  return inputs, ids.astype(np.int32), d_out


def oracle(inputs, ids, d_out):
  """Returns out and the gradients of the five inputs in float64."""
  x, weights, gate, up, down = (np.asarray(a, np.float64) for a in inputs)
  d_out = np.asarray(d_out, np.float64)
  out, d_x, d_weights = np.zeros_like(x), np.zeros_like(x), weights * 0
  d_gate, d_up, d_down = (np.zeros_like(w) for w in (gate, up, down))
  for t, a in np.ndindex(*ids.shape):
    e = ids[t, a]
    if not 0 <= e < gate.shape[0]:
      continue
    g, u = x[t] @ gate[e], x[t] @ up[e]
    sigmoid = 1.0 / (1.0 + np.exp(-g))
    h = g * sigmoid * u
    out[t] += weights[t, a] * (h @ down[e])
    d_weights[t, a] = d_out[t] @ (h @ down[e])
    d_y = weights[t, a] * d_out[t]
    d_down[e] += np.outer(h, d_y)
    d_h = down[e] @ d_y
    d_g = d_h * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    d_u = d_h * g * sigmoid
    d_gate[e] += np.outer(x[t], d_g)
    d_up[e] += np.outer(x[t], d_u)
    d_x[t] += gate[e] @ d_g + up[e] @ d_u
  return out, d_x, d_weights, d_gate, d_up, d_down


def run(implementation, inputs, ids, d_out):
  """Returns out and the gradients of the code under test."""

  @jax.jit
  def both(inputs, ids, d_out):
    def apply(x, weights, *matrices):
      return expert_ffn(
        x, ids, weights, *matrices, implementation=implementation
      )

    out, pull_back = jax.vjp(apply, *inputs)
    return out, *pull_back(d_out)

  return both(tuple(inputs), ids, d_out)


def check(implementation, inputs, ids, d_out):
  got = run(implementation, inputs, ids, d_out)
  want = oracle(inputs, ids, d_out)
  for one_got, one_want in zip(got, want):
    assert one_got.dtype == np.float32
    assert_close(one_got, one_want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SIZES)
def test_value_and_gradient_equal_the_oracle(name, implementation):
  check(implementation, *draw(SIZES[name]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_of_other_shards_add_nothing(implementation):
  inputs, ids, d_out = draw(SIZES["odd"])
  check(implementation, inputs, ids - 2, d_out)
  out, *_ = run(implementation, inputs, np.full_like(ids, 99), d_out)
  assert not np.any(np.asarray(out))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_token_on_one_expert(implementation):
  inputs, ids, d_out = draw((300, 2, 4, 8, 8))
  ids[:, 0] = 3
  ids[:, 1] = -1
  check(implementation, inputs, ids, d_out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_expert_twice_for_a_token(implementation):
  inputs, ids, d_out = draw((6, 2, 3, 4, 4))
  ids[:] = 1
  check(implementation, inputs, ids, d_out)


def test_shards_sum_to_the_whole():
  inputs, ids, d_out = draw((50, 3, 6, 8, 8))
  whole, *_ = run("xla", inputs, ids, d_out)
  x, weights, *matrices = inputs
  total = np.zeros_like(np.asarray(whole))
  for first in (0, 2, 4):
    shard = [m[first : first + 2] for m in matrices]
    total += run("xla", (x, weights, *shard), ids - first, d_out)[0]
  assert_close(total, whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_are_summed_in_float32(implementation):
  inputs, ids, d_out = draw((40, 2, 3, 64, 16))
  x, weights, *matrices = inputs
  low = [jnp.asarray(a, jnp.bfloat16) for a in (x, *matrices)]
  inputs = (low[0], weights, *low[1:])
  got = run(implementation, inputs, ids, d_out)
  want = oracle(inputs, ids, d_out)
  assert got[0].dtype == jnp.float32
  for one_got, one_want, given in zip(got[1:], want[1:], inputs):
    assert one_got.dtype == given.dtype
    assert_close(one_got, one_want, "bfloat16")
  assert_close(got[0], want[0], "bfloat16")


def test_bad_input_is_told():
  (x, weights, gate, up, down), ids, _ = draw(SIZES["odd"])
  with pytest.raises(ValueError, match="implementation='cuda'"):
    expert_ffn(x, ids, weights, gate, up, down, implementation="cuda")
  with pytest.raises(ValueError, match="x_TD"):
    expert_ffn(x[:, :3], ids, weights, gate, up, down)
  with pytest.raises(ValueError, match="down_EFD"):
    expert_ffn(x, ids, weights, gate, up, up)
  with pytest.raises(ValueError, match="weights_TA"):
    expert_ffn(x, ids, weights[:, :1], gate, up, down)
  with pytest.raises(ValueError, match="must be an integer"):
    expert_ffn(x, ids.astype(np.float32), weights, gate, up, down)
