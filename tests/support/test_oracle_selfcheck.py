"""The oracle's pieces: by hand, by finite differences, by what must hold.

Axes as in oracle_ops.py and oracle_layers.py.
"""

import ml_dtypes
import numpy as np
import pytest

from tests.support import finite_difference
from tests.support import oracle_layers
from tests.support import oracle_ops
from tests.support import tolerances

EXACT = tolerances.TOLERANCE["float64"]


def close(got, want, tolerance=EXACT):
  np.testing.assert_allclose(got, want, rtol=tolerance[0], atol=tolerance[1])


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_norms_by_hand():
  close(
    oracle_ops.rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.0),
    np.array([3.0, 8.0]) / np.sqrt(12.5),
  )
  got = oracle_ops.layer_norm(
    np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([0.5, 0.0]), 0.0
  )
  close(got, np.array([-1.5, 2.0]))


def test_sigmoid_and_log_softmax_do_not_overflow():
  close(oracle_ops.sigmoid(np.array([-1e4, 0.0, 1e4])), [0.0, 0.5, 1.0])
  close(oracle_ops.silu(np.array([np.log(3.0)])), [0.75 * np.log(3.0)])
  x_S = np.array([1e4, 1e4 + np.log(3.0), -1e4])
  mask_S = np.array([True, True, False])
  close(oracle_ops.masked_softmax(x_S, mask_S), [0.25, 0.75, 0.0], (1e-9, 0))
  empty_S = oracle_ops.masked_softmax(x_S, np.zeros(3, bool))
  np.testing.assert_array_equal(empty_S, np.zeros(3))


def test_yarn_of_the_released_config():
  args = {
    "theta": 1e4,
    "original_length": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
  }
  assert oracle_ops.yarn_bounds(64, **args) == (10, 23)
  scaled_P = oracle_ops.yarn_frequencies(64, factor=40.0, **args)
  plain_P = oracle_ops.yarn_frequencies(64, factor=1.0, **args)
  close(plain_P, 1e4 ** (-np.arange(32) / 32))
  close(scaled_P[:11], plain_P[:11])
  close(scaled_P[23:], plain_P[23:] / 40)
  share = 3 / 13
  close(scaled_P[13], plain_P[13] * (1 - share + share / 40))
  scale = oracle_ops.attention_scale(192, factor=40.0)
  close(scale, 0.1352337788608801)
  close(oracle_ops.attention_scale(192, factor=1.0), 192**-0.5)


def test_rope_layouts(rng):
  quarter_P = np.full(2, np.pi / 2)
  x_R = np.array([1.0, 2.0, 3.0, 4.0])
  got = oracle_ops.rope_interleaved(x_R, quarter_P)
  close(got, [-2.0, 1.0, -4.0, 3.0])
  got = oracle_ops.rope_half_split(x_R, quarter_P)
  close(got, [-3.0, -4.0, 1.0, 2.0])
  q_R, k_R = rng.standard_normal((2, 8))
  frequency_P = rng.uniform(0.1, 1.0, 4)
  for rotate in (oracle_ops.rope_interleaved, oracle_ops.rope_half_split):
    near = rotate(q_R, 9 * frequency_P) @ rotate(k_R, 4 * frequency_P)
    far = rotate(q_R, 105 * frequency_P) @ rotate(k_R, 100 * frequency_P)
    close(near, far)


@pytest.mark.parametrize("width", [1, 2, 16, 128])
def test_hadamard_is_sylvesters(rng, width):
  matrix_KK = np.ones((1, 1))
  while len(matrix_KK) < width:
    matrix_KK = np.block([[matrix_KK, matrix_KK], [matrix_KK, -matrix_KK]])
  x_K = rng.standard_normal((3, width))
  close(oracle_ops.hadamard(x_K), x_K @ matrix_KK / np.sqrt(width))
  close(oracle_ops.hadamard(oracle_ops.hadamard(x_K)), x_K)


def test_act_quant_by_hand():
  x_X = np.zeros((4, 128))
  x_X[0, 0], x_X[1, 0], x_X[2, 0] = 448.0, -449.0, 1.3
  values_X, scale_Q = oracle_ops.act_quant(x_X)
  np.testing.assert_array_equal(scale_Q[:, 0], [1.0, 2.0, 2.0**-8, 2.0**-22])
  # 449 / 2 lies between 224 and 240; 1.3 * 256 = 332.8 between 320 and 352.
  dequantised_X = oracle_ops.dequantise_rows(values_X, scale_Q)
  np.testing.assert_array_equal(dequantised_X[:3, 0], [448.0, -448.0, 1.25])
  _, plain_Q = oracle_ops.act_quant(x_X, power_of_two=False)
  close(plain_Q[:, 0], [1.0, 449 / 448, 1.3 / 448, 1e-4 / 448], (1e-6, 0))


def test_quantisation_error_is_half_a_step(rng):
  x_X = rng.standard_normal((5, 256))
  values_X, scale_Q = oracle_ops.act_quant(x_X)
  got_X = oracle_ops.dequantise_rows(values_X, scale_Q)
  # Three mantissa bits, and a smallest step of 2^-9 times the scale.
  step_X = np.repeat(scale_Q, 128, axis=-1) * 2.0**-9
  bound_X = np.maximum(np.abs(x_X) * 2.0**-4, step_X / 2)
  assert (np.abs(got_X - x_X) <= bound_X * (1 + 1e-6)).all()


def test_weight_blocks_may_be_partial(rng):
  values_OX = rng.standard_normal((130, 257)).astype(ml_dtypes.float8_e4m3fn)
  scale_ZQ = 2.0 ** rng.integers(-3, 3, (2, 3))
  got_OX = oracle_ops.dequantise_weight(values_OX, scale_ZQ)
  for o, x in [(0, 0), (127, 127), (128, 128), (129, 256), (5, 256)]:
    assert got_OX[o, x] == float(values_OX[o, x]) * scale_ZQ[o // 128, x // 128]


def index_case(rng, heads=3, width=8, tokens=5):
  q_BTIK = rng.standard_normal((2, tokens, heads, width))
  k_BSK = rng.standard_normal((2, tokens, width))
  weight_BTI = rng.standard_normal((2, tokens, heads))
  return q_BTIK, k_BSK, weight_BTI


def test_index_scores_by_loops(rng):
  q_BTIK, k_BSK, weight_BTI = index_case(rng)
  got_BTS = oracle_ops.index_scores(q_BTIK, k_BSK, weight_BTI)
  for b, t, s in np.ndindex(got_BTS.shape):
    want = sum(
      weight_BTI[b, t, i] * max(q_BTIK[b, t, i] @ k_BSK[b, s], 0.0)
      for i in range(3)
    )
    close(got_BTS[b, t, s], want)


def test_quantised_scores_are_near_and_exact_on_e4m3(rng):
  q_BTIK, k_BSK, weight_BTI = index_case(rng, width=128)
  want_BTS = oracle_ops.index_scores(q_BTIK, k_BSK, weight_BTI)
  got_BTS = oracle_ops.index_scores_quantised(q_BTIK, k_BSK, weight_BTI)
  error = np.abs(got_BTS - want_BTS).max() / np.abs(want_BTS).max()
  assert 0 < error < tolerances.TOLERANCE["float8_e4m3fn"][0]
  q8_BTIK, q_scale_BTI1 = oracle_ops.act_quant(q_BTIK)
  k8_BSK, k_scale_BS1 = oracle_ops.act_quant(k_BSK)
  q_BTIK = oracle_ops.dequantise_rows(q8_BTIK, q_scale_BTI1)
  k_BSK = oracle_ops.dequantise_rows(k8_BSK, k_scale_BS1)
  close(
    oracle_ops.index_scores_fp8(q_BTIK, k_BSK, weight_BTI),
    oracle_ops.index_scores(q_BTIK, k_BSK, weight_BTI),
  )


def test_index_scores_backward(rng):
  arrays = index_case(rng)
  grad_BTS = rng.standard_normal((2, 5, 5))
  got = oracle_ops.index_scores_backward(grad_BTS, *arrays)
  for place in range(3):

    def total(value, place=place):
      changed = list(arrays)
      changed[place] = value
      return np.sum(grad_BTS * oracle_ops.index_scores(*changed))

    close(
      got[place],
      finite_difference.finite_difference(total, arrays[place]),
      finite_difference.DIFFERENCE_TOLERANCE,
    )


def test_selection_by_sorting(rng):
  # Few distinct values make ties certain.
  scores_BTS = rng.integers(-2, 3, (2, 11, 11)).astype(np.float64)
  # Negation turns some of the zeros into -0.0.
  scores_BTS[:, :, ::2] *= -1.0
  segments_BT = np.sort(rng.integers(0, 3, (2, 11)), axis=1)
  allowed_BTS = oracle_ops.allowed_pairs(2, 11, segments_BT)
  got_BTS = oracle_ops.select_top_k(scores_BTS, allowed_BTS, 4)
  for b, t in np.ndindex(2, 11):
    keys = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
    keys.sort(key=lambda s: (-(scores_BTS[b, t, s] + 0.0), s))
    assert set(np.flatnonzero(got_BTS[b, t])) == set(keys[:4])
  everything_BTS = oracle_ops.select_top_k(scores_BTS, allowed_BTS, 11)
  np.testing.assert_array_equal(everything_BTS, allowed_BTS)
  more_BTS = oracle_ops.select_top_k(scores_BTS, allowed_BTS, 99)
  np.testing.assert_array_equal(more_BTS, allowed_BTS)


def test_negative_zero_ties_with_zero():
  scores_BTS = np.array([[[-0.0, 0.0, -1.0, 0.0]]])
  allowed_BTS = np.ones((1, 1, 4), bool)
  got_BTS = oracle_ops.select_top_k(scores_BTS, allowed_BTS, 2)
  np.testing.assert_array_equal(got_BTS[0, 0], [True, True, False, False])


def test_selection_encodings(rng):
  mask_BTS = rng.random((2, 3, 70)) < 0.2
  bits_BTM = oracle_ops.mask_to_bits(mask_BTS)
  assert bits_BTM.dtype == np.uint32
  assert bits_BTM.shape == (2, 3, 3)
  indices_BTJ = oracle_ops.mask_to_indices(mask_BTS, 40)
  for b, t, s in np.ndindex(mask_BTS.shape):
    bit = (int(bits_BTM[b, t, s // 32]) >> (s % 32)) & 1
    assert bool(bit) == mask_BTS[b, t, s] == (s in indices_BTJ[b, t])
  assert (indices_BTJ >= 0).sum() == mask_BTS.sum()


def test_agreement_of_selections():
  scores_BTS = np.array([[[5.0, 1.0, 1.0 + 4e-5, 0.5]]])
  allowed_BTS = np.ones((1, 1, 4), bool)

  def agree(*keys):
    mask_BTS = np.isin(np.arange(4), (0, 2))[None, None]
    other_BTS = np.isin(np.arange(4), keys)[None, None]
    return oracle_ops.selections_agree(
      scores_BTS, mask_BTS, other_BTS, allowed_BTS, 2
    )[0, 0]

  assert agree(0, 2)
  assert agree(0, 1)
  assert not agree(0, 3)
  assert not agree(1, 2)
  assert not agree(0)
  causal_BTS = oracle_ops.allowed_pairs(1, 4)
  scores_BTS = np.broadcast_to(scores_BTS, (1, 4, 4))
  chosen_BTS = oracle_ops.select_top_k(scores_BTS, causal_BTS, 3)
  same_BT = oracle_ops.selections_agree(
    scores_BTS, chosen_BTS, chosen_BTS, causal_BTS, 3
  )
  assert same_BT.all()
  fewer_BTS = chosen_BTS & ~np.eye(4, dtype=bool)
  differ_BT = oracle_ops.selections_agree(
    scores_BTS, fewer_BTS, chosen_BTS, causal_BTS, 3
  )
  np.testing.assert_array_equal(differ_BT, [[False, False, False, True]])


def test_absorbed_attention_equals_expanded(rng):
  shapes = ((2, 5, 3, 4), (2, 5, 3, 6), (2, 5, 7), (2, 5, 6), (7, 3, 4))
  arrays = [rng.standard_normal(shape) for shape in (*shapes, (7, 3, 5))]
  mask_BTS = rng.random((2, 5, 5)) < 0.5
  mask_BTS |= np.eye(5, dtype=bool)
  want = oracle_layers.attention_expanded(*arrays, mask_BTS, 0.3)
  got = oracle_layers.attention_absorbed(*arrays, mask_BTS, 0.3)
  close(got[0], want[0])
  close(got[1], want[1])
  close(want[1].sum(-1), np.ones((2, 5, 3)))
  assert (want[1][~np.repeat(mask_BTS[:, :, None], 3, 2)] == 0).all()


def choose(affinity_E, bias_E, groups_kept, experts_per_token):
  return oracle_layers.select_experts(
    np.array(affinity_E)[None, None],
    np.array(bias_E),
    num_groups=3,
    groups_kept=groups_kept,
    experts_per_token=experts_per_token,
  )[0, 0]


def test_router_by_hand():
  affinity_E = [0.9, 0.1, 0.1, 0.6, 0.5, 0.1, 0.3, 0.4, 0.6]
  no_bias_E = [0.0] * 9
  # The best expert's group loses by its top-2 sum: 1.0 < 1.1, 1.0.
  affinity_E[1] = affinity_E[2] = 0.05
  assert list(choose(affinity_E, no_bias_E, 2, 3)) == [3, 8, 4]
  # A bias chooses, also a negative one, and never weighs.
  bias_E = [-2.0, -2.0, -2.0, -1.0, -1.0, -1.0, -1.5, -1.5, -1.5]
  assert list(choose(affinity_E, bias_E, 1, 3)) == [3, 4, 5]
  weights_BTE = oracle_layers.combine_weights(
    np.array(affinity_E)[None, None],
    np.array([[[3, 4, 5]]]),
    normalize=True,
    routed_scale=2.5,
  )
  close(weights_BTE[0, 0, 3:6], 2.5 * np.array([0.6, 0.5, 0.1]) / 1.2)
  assert weights_BTE.sum() == pytest.approx(2.5)
  # Ties go to the lowest index, among groups and among experts.
  assert list(choose([0.5] * 9, no_bias_E, 2, 4)) == [0, 1, 2, 3]


def test_mixture_by_tokens(rng):
  x_BTD = rng.standard_normal((2, 4, 5))
  gate_EDF, up_EDF = rng.standard_normal((2, 6, 5, 3))
  down_EFD = rng.standard_normal((6, 3, 5))
  weights_BTE = rng.random((2, 4, 6)) * (rng.random((2, 4, 6)) < 0.4)
  got_BTD = oracle_layers.mixture(
    x_BTD, weights_BTE, gate_EDF, up_EDF, down_EFD
  )
  for b, t in np.ndindex(2, 4):
    want_D = np.zeros(5)
    for e in np.flatnonzero(weights_BTE[b, t]):
      gate_F = x_BTD[b, t] @ gate_EDF[e]
      hidden_F = gate_F / (1 + np.exp(-gate_F)) * (x_BTD[b, t] @ up_EDF[e])
      want_D += weights_BTE[b, t, e] * (hidden_F @ down_EFD[e])
    close(got_BTD[b, t], want_D)


def test_balance_loss_and_bias_update():
  experts_BTA = np.array([[[0, 1], [2, 3]], [[0, 1], [0, 1]]])
  flat_BTE = np.full((2, 2, 4), 0.5)
  close(oracle_layers.balance_loss(flat_BTE, experts_BTA), [1.0, 1.0])
  skewed_BTE = np.broadcast_to([0.4, 0.4, 0.1, 0.1], (2, 2, 4))
  close(oracle_layers.balance_loss(skewed_BTE, experts_BTA), [1.0, 1.6])
  mask_BT = np.array([[True, False], [False, False]])
  got_B = oracle_layers.balance_loss(skewed_BTE, experts_BTA, mask_BT)
  close(got_B, [1.6, 0.0])
  load_E = oracle_layers.expert_load(experts_BTA, 4)
  close(load_E, [3.0, 3.0, 1.0, 1.0])
  close(oracle_layers.expert_load(experts_BTA, 4, mask_BT), [1, 1, 0, 0])
  got_E = oracle_layers.update_router_bias(np.zeros(4), load_E, 0.001)
  close(got_E, [-0.001, -0.001, 0.001, 0.001])
  even_E = oracle_layers.update_router_bias(np.ones(4), np.full(4, 2.0), 0.001)
  close(even_E, np.ones(4))
