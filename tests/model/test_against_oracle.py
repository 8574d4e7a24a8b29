"""Each maths function of the model against the float64 oracle, in float32.

Axes: B batch, T queries, S keys, D width, H heads, N nope width, R rotary
width, P rotary pairs, C latent, V value width, I index heads, K index width,
E experts, A experts a token, F expert width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import forms
from dsv32_jax.model import indexer
from dsv32_jax.model import layers
from dsv32_jax.model import moe
from dsv32_jax.model import presets
from dsv32_jax.model import rope
from dsv32_jax.model import selection
from pallas_kernels import bitmask
from tests.support import oracle_layers
from tests.support import oracle_ops
from tests.support import tolerances

SEGMENTS_BT = np.array([[1] * 13, [1] * 4 + [2] * 1 + [3] * 8], np.int32)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def close(got, want):
  assert got.dtype == jnp.float32
  tolerances.assert_close(got, want, "float32")


def draw(rng, *shape):
  """Float32 values of order one, and the same in float64."""
  x32 = rng.standard_normal(shape).astype(np.float32)
  return x32, x32.astype(np.float64)


def test_norms(rng):
  x32, x = draw(rng, 2, 3, 37)
  scale32, scale = draw(rng, 37)
  bias32, bias = draw(rng, 37)
  close(
    layers.rms_norm(x32, scale32, 1e-6), oracle_ops.rms_norm(x, scale, 1e-6)
  )
  # The mean dwarfs the spread: a variance by differences of squares fails.
  got = layers.layer_norm(x32 + np.float32(30), scale32, bias32, 1e-6)
  shifted = (x32 + np.float32(30)).astype(np.float64)
  close(got, oracle_ops.layer_norm(shifted, scale, bias, 1e-6))
  tiny32 = x32 * np.float32(1e-3)
  got = layers.rms_norm(tiny32, scale32, 1e-6)
  close(got, oracle_ops.rms_norm(tiny32.astype(np.float64), scale, 1e-6))


def test_swiglu(rng):
  gate32, gate = draw(rng, 5, 7)
  up32, up = draw(rng, 5, 7)
  close(layers.swiglu(gate32, up32), oracle_ops.silu(gate) * up)


def yarn_args(config):
  return {
    "theta": config.theta,
    "factor": config.factor,
    "original_length": config.original_length,
    "beta_fast": config.beta_fast,
    "beta_slow": config.beta_slow,
  }


@pytest.mark.parametrize(
  ("width", "changes"),
  [
    (64, {}),
    (64, {"factor": 1.0}),
    (16, {"factor": 8.0, "original_length": 32}),
    (8, {"factor": 4.0, "original_length": 8, "beta_fast": 2.0}),
    (8, {"factor": 4.0, "original_length": 6, "beta_fast": 1.0}),
  ],
)
def test_rope(rng, width, changes):
  config = dataclasses.replace(presets.deepseek_v32_671b().rope, **changes)
  want_P = oracle_ops.yarn_frequencies(width, **yarn_args(config))
  np.testing.assert_allclose(
    rope.frequencies(width, config), want_P, rtol=1e-6, atol=0
  )
  positions_BT = np.array([[0, 1, 2, 31, 60], [7, 5, 3, 100, 0]])
  cos_BTP, sin_BTP = rope.rotation_tables(positions_BT, width, config)
  angle_BTP = positions_BT[..., None] * want_P
  close(cos_BTP, np.cos(angle_BTP))
  close(sin_BTP, np.sin(angle_BTP))
  with_heads32, with_heads = draw(rng, 2, 5, 3, width)
  without32, without = draw(rng, 2, 5, width)
  for got, want in (
    (rope.rotate_interleaved, oracle_ops.rope_interleaved),
    (rope.rotate_half_split, oracle_ops.rope_half_split),
  ):
    close(
      got(with_heads32, cos_BTP, sin_BTP),
      want(with_heads, angle_BTP[:, :, None]),
    )
    close(got(without32, cos_BTP, sin_BTP), want(without, angle_BTP))


def test_scales_of_the_released_config():
  config = presets.deepseek_v32_671b()
  want = oracle_ops.attention_scale(192, factor=40.0)
  assert config.softmax_scale == pytest.approx(want, rel=1e-12)
  assert config.index_scale == pytest.approx(64**-0.5 * 128**-0.5, rel=1e-12)
  plain = dataclasses.replace(
    config, rope=dataclasses.replace(config.rope, factor=1.0)
  )
  assert plain.softmax_scale == pytest.approx(192**-0.5, rel=1e-12)


def visibility(segments_BT):
  batch, tokens = SEGMENTS_BT.shape
  slots_BT = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
  return selection.Visibility(jnp.asarray(slots_BT), segments_BT, segments_BT)


@pytest.mark.parametrize(
  ("segments_BT", "top_k"),
  [(SEGMENTS_BT, 5), (None, 40)],
)
def test_top_k(rng, segments_BT, top_k):
  # Small integers: sums are exact and ties are many.
  query_BTIK = rng.integers(-1, 2, (2, 13, 3, 4)).astype(np.float32)
  key_BSK = rng.integers(-1, 2, (2, 13, 4)).astype(np.float32)
  weight_BTI = rng.integers(-2, 3, (2, 13, 3)).astype(np.float32)
  scores_BTS = oracle_ops.index_scores(query_BTIK, key_BSK, weight_BTI)
  want_BTS = oracle_ops.select_top_k(
    scores_BTS, oracle_ops.allowed_pairs(2, 13, segments_BT), top_k
  )
  index = indexer.IndexInputs(query_BTIK, key_BSK, weight_BTI)
  for want_indices in (False, True):

    @jax.jit
    def choose(index, key_BSK, sight, want_indices=want_indices):
      return selection.TopK(top_k)(
        index, key_BSK, sight, layer=0, want_indices=want_indices
      )

    got = choose(index, key_BSK, visibility(segments_BT))
    words_BTW = got.mask_BTW
    if want_indices:
      words_BTW = bitmask.from_indices(got.indices_BTN, 13)
    np.testing.assert_array_equal(words_BTW, oracle_ops.mask_to_bits(want_BTS))
    assert not got.invalid_BT.any()


@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT])
def test_window(segments_BT):
  # The window is the top-k choice of a score that grows with the place.
  allowed_BTS = oracle_ops.allowed_pairs(2, 13, segments_BT)
  place_BTS = np.broadcast_to(np.arange(13.0), (2, 13, 13))
  want_BTS = oracle_ops.select_top_k(place_BTS, allowed_BTS, 4)
  for want_indices in (False, True):
    got = selection.Window(4)(
      None,
      jnp.zeros((2, 13, 4)),
      visibility(segments_BT),
      layer=0,
      want_indices=want_indices,
    )
    words_BTW = got.mask_BTW
    if want_indices:
      words_BTW = bitmask.from_indices(got.indices_BTN, 13)
    got_BTS = bitmask.unpack(words_BTW, 13) & allowed_BTS
    np.testing.assert_array_equal(got_BTS, want_BTS)


def test_fake_quantize_is_exact(rng):
  # The transform of integers with a width of 4^n is exact in float32.
  x32 = rng.integers(-50, 51, (2, 5, 3, 64)).astype(np.float32)
  x32[0, 0] = 0.0
  x32[0, 1] *= 1e-7
  x32[0, 2, 0] = 0.0
  x32[0, 2, 0, 0] = 448.0 * 8
  values, scales = oracle_ops.act_quant(
    oracle_ops.hadamard(x32.astype(np.float64)), block=64
  )
  want = oracle_ops.dequantise_rows(values, scales)
  got = indexer.fake_quantize(jnp.asarray(x32))
  np.testing.assert_array_equal(got[:, 2:], want[:, 2:])
  np.testing.assert_array_equal(got[0, 0], want[0, 0])
  close(got * 1e3, want * 1e3)


def projected(rng):
  shapes = ((2, 13, 3, 6), (2, 13, 3, 4), (2, 13, 10), (2, 13, 4))
  shapes = (*shapes, (10, 3, 6), (10, 3, 5))
  return [array / 2 for array in (draw(rng, *shape)[1] for shape in shapes)]


@pytest.mark.parametrize("form", ["expanded", "absorbed", "gathered"])
@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT])
def test_attention_forms(rng, form, segments_BT):
  arrays = [x.astype(np.float32) for x in projected(rng)]
  allowed_BTS = oracle_ops.allowed_pairs(2, 13, segments_BT)
  scores_BTS = rng.standard_normal((2, 13, 13))
  selected_BTS = oracle_ops.select_top_k(scores_BTS, allowed_BTS, 4)
  want, _ = oracle_layers.attention_expanded(
    *(x.astype(np.float64) for x in arrays), selected_BTS, 0.3
  )
  words_BTW = jnp.asarray(oracle_ops.mask_to_bits(selected_BTS))
  chosen = selection.Selection(
    words_BTW, jnp.asarray(oracle_ops.mask_to_indices(selected_BTS, 4)), None
  )
  sight = visibility(segments_BT)
  args = forms.Projected(*(jnp.asarray(x) for x in arrays))
  got, kl_BT = forms.FORMS[form](args, chosen, sight, None, None, scale=0.3)
  assert kl_BT is None
  close(got, want)
  if form == "gathered":
    return
  want, _ = oracle_layers.attention_expanded(
    *(x.astype(np.float64) for x in arrays), allowed_BTS, 0.3
  )
  got, _ = forms.FORMS[form](args, None, sight, None, None, scale=0.3)
  close(got, want)


ROUTERS = [
  {},
  {"num_expert_groups": 1, "expert_groups_kept": 1},
  {"expert_groups_kept": 3},
  {"normalize_expert_weights": False, "routed_scale": 1.0},
]


def router_config(**changes):
  groups = {"num_expert_groups": 3, "expert_groups_kept": 2}
  sizes = {"num_experts": 12, "experts_per_token": 4}
  return dataclasses.replace(presets.tiny(), **(sizes | groups | changes))


@pytest.mark.parametrize("changes", ROUTERS)
def test_router(rng, changes):
  config = router_config(**changes)
  x32, x = draw(rng, 2, 9, 16)
  router32, router = draw(rng, 16, 12)
  bias32, bias = draw(rng, 12)
  # Below zero, so that a masked expert must not score 0.
  bias32, bias = bias32 / 4 - np.float32(1.5), bias / 4 - 1.5
  router32, router = router32 / 4, router / 4
  affinity_BTE = oracle_layers.router_affinity(x, router)
  experts_BTA = oracle_layers.select_experts(
    affinity_BTE,
    bias,
    num_groups=config.num_expert_groups,
    groups_kept=config.expert_groups_kept,
    experts_per_token=4,
  )
  want_BTE = oracle_layers.combine_weights(
    affinity_BTE,
    experts_BTA,
    normalize=config.normalize_expert_weights,
    routed_scale=config.routed_scale,
  )
  got = moe.route(x32, router32, bias32, config)
  np.testing.assert_array_equal(got.experts_BTA, experts_BTA)
  close(got.affinities_BTE, affinity_BTE)
  close(got.weights_BTA, np.take_along_axis(want_BTE, experts_BTA, -1))
  moved_BTA = (experts_BTA + 1) % 12
  replayed = moe.route(x32, router32, bias32, config, jnp.asarray(moved_BTA))
  want_BTE = oracle_layers.combine_weights(
    affinity_BTE,
    moved_BTA,
    normalize=config.normalize_expert_weights,
    routed_scale=config.routed_scale,
  )
  close(replayed.weights_BTA, np.take_along_axis(want_BTE, moved_BTA, -1))


def test_router_ties(rng):
  config = router_config()
  affinity_BTE = rng.integers(0, 3, (2, 40, 12)) / 4.0
  bias_E = rng.integers(-2, 2, 12) / 4.0
  want_BTA = oracle_layers.select_experts(
    affinity_BTE,
    bias_E,
    num_groups=3,
    groups_kept=2,
    experts_per_token=4,
  )
  got_BTA = moe.choose_experts(
    jnp.asarray(affinity_BTE, jnp.float32),
    jnp.asarray(bias_E, jnp.float32),
    config,
  )
  np.testing.assert_array_equal(got_BTA, want_BTA)


def test_balance_and_bias(rng):
  affinity_BTE = rng.random((3, 9, 12))
  experts_BTA = np.argsort(rng.random((3, 9, 12)), axis=-1)[..., :4]
  # An empty sequence counts zero in the mean over sequences.
  real_BT = rng.random((3, 9)) < 0.7
  real_BT[2] = False
  routing = moe.Routing(
    jnp.asarray(experts_BTA, jnp.int32),
    None,
    jnp.asarray(affinity_BTE, jnp.float32),
  )
  want_B = oracle_layers.balance_loss(affinity_BTE, experts_BTA, real_BT)
  close(moe.balance_loss(routing, jnp.asarray(real_BT)), want_B.mean())
  load_E = moe.expert_load(routing.experts_BTA, jnp.asarray(real_BT), 12)
  want_E = oracle_layers.expert_load(experts_BTA, 12, real_BT)
  np.testing.assert_array_equal(load_E, want_E)
  bias_E = rng.standard_normal(12).astype(np.float32)
  got_E = moe.update_bias(bias_E, load_E, 0.001)
  close(got_E, oracle_layers.update_router_bias(bias_E, want_E, 0.001))


@pytest.mark.parametrize("lopsided", [False, True])
def test_routed_experts(rng, lopsided):
  x32, x = draw(rng, 2, 9, 16)
  gate32, gate = draw(rng, 12, 16, 5)
  up32, up = draw(rng, 12, 16, 5)
  down32, down = draw(rng, 12, 5, 16)
  experts_BTA = np.argsort(rng.random((2, 9, 12)), axis=-1)[..., :4]
  if lopsided:
    experts_BTA = np.broadcast_to([3, 0, 11, 7], (2, 9, 4))
  weights_BTA = rng.random((2, 9, 4)).astype(np.float32)
  weights_BTE = np.zeros((2, 9, 12))
  np.put_along_axis(weights_BTE, experts_BTA, weights_BTA, -1)
  routing = moe.Routing(
    jnp.asarray(experts_BTA, jnp.int32), jnp.asarray(weights_BTA), None
  )
  got = moe.routed_experts(
    jnp.asarray(x32 / 4),
    routing,
    *(jnp.asarray(w / 4) for w in (gate32, up32, down32)),
  )
  want = oracle_layers.mixture(x / 4, weights_BTE, gate / 4, up / 4, down / 4)
  close(got, want)
