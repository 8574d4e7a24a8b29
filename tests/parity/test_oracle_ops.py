"""Each function against recorded arrays at the released model's sizes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import layers
from dsv32_jax.model import moe
from dsv32_jax.model import presets
from dsv32_jax.model import rope
from dsv32_jax.weights import blocks
from pallas_kernels import fp8
from pallas_kernels import index_select
from tests.parity import comparison

pytestmark = pytest.mark.parity

# Set by those who recorded the arrays, relative to the largest entry.
TOLERANCE = 1e-5
CONFIG = presets.deepseek_v32_671b()


@pytest.fixture(scope="module")
def ops(oracle_folder):
  with np.load(oracle_folder / "ops_realdims.npz") as arrays:
    return dict(arrays)


def assert_matches(ops, name, got):
  comparison.assert_matches(name, np.asarray(got), ops[name], TOLERANCE)


@pytest.mark.parametrize(
  ("kind", "power_of_two"), [("plain", False), ("ue8m0", True)]
)
def test_quantised_activations_bit_by_bit(ops, kind, power_of_two):
  values, scales = fp8.quantize(
    jnp.asarray(ops["aq_x"]), power_of_two=power_of_two
  )
  bits = np.asarray(values).view(np.uint8)
  np.testing.assert_array_equal(bits, ops[f"aq_{kind}_y_bits"])
  np.testing.assert_array_equal(scales, ops[f"aq_{kind}_s"])
  np.testing.assert_array_equal(values.astype(float), ops[f"aq_{kind}_y"])


def test_quantised_matmul(ops):
  weight = ops["gemm_w_bits"].view(jnp.float8_e4m3fn)
  scale_inv = ops["gemm_w_scale_inv"]
  for dequantize in (fp8.dequantize_blocks, blocks.dequantize):
    got = np.asarray(dequantize(weight, scale_inv))
    np.testing.assert_array_equal(got, ops["gemm_w_dequant"])
  values, scales = fp8.quantize(jnp.asarray(ops["gemm_a"]))
  got = fp8.matmul(values, scales, jnp.asarray(weight), jnp.asarray(scale_inv))
  assert_matches(ops, "gemm_out", got)


def test_hadamard(ops):
  assert_matches(ops, "had_y", fp8.hadamard(jnp.asarray(ops["had_x"])))


def test_index_scores(ops):
  query, key, weight = (jnp.asarray(ops[f"idx_{x}"]) for x in "qkw")
  got = index_select.index_scores(query, key, weight)
  assert_matches(ops, "idx_score_exact", got)
  query8, query_scale = fp8.quantize(query)
  key8, key_scale = fp8.quantize(key)
  got = index_select.index_scores(
    query8.astype(jnp.float32),
    key8.astype(jnp.float32),
    weight * query_scale[..., 0],
  )
  assert_matches(ops, "idx_score_fp8", got * key_scale[:, None, :, 0])


def test_yarn(ops):
  width = CONFIG.rope_width
  got = rope.frequencies(width, CONFIG.rope)
  np.testing.assert_array_equal(got, ops["yarn_inv_freq"])
  low, high = ops["yarn_low_high"]
  plain = rope.frequencies(width, dataclasses.replace(CONFIG.rope, factor=1.0))
  np.testing.assert_array_equal(got[: low + 1], plain[: low + 1])
  np.testing.assert_allclose(got[high:], plain[high:] / 40, rtol=1e-6)
  np.testing.assert_allclose(
    CONFIG.softmax_scale, ops["softmax_scale_real"], rtol=1e-12
  )


def test_rotation(ops):
  position_BT = jnp.asarray(ops["yarn_pos"], jnp.int32)[None]
  cos, sin = rope.rotation_tables(position_BT, CONFIG.rope_width, CONFIG.rope)
  assert_matches(ops, "yarn_cos", cos[0])
  assert_matches(ops, "yarn_sin", sin[0])
  x = jnp.asarray(ops["rope_x"])
  got = rope.rotate_interleaved(x, cos, sin)
  assert_matches(ops, "rope_interleaved", got)
  assert_matches(ops, "rope_half", rope.rotate_half_split(x, cos, sin))


def test_router(ops):
  router_DE = jnp.asarray(ops["gate_weight"].T)
  routing = moe.route(
    jnp.asarray(ops["gate_x"])[None], router_DE, ops["gate_bias"], CONFIG
  )
  got_TE = np.zeros_like(ops["gate_dense"])
  np.put_along_axis(
    got_TE,
    np.asarray(routing.experts_BTA)[0],
    np.asarray(routing.weights_BTA)[0],
    axis=-1,
  )
  assert_matches(ops, "gate_dense", got_TE)
  np.testing.assert_array_equal(got_TE > 0, ops["gate_dense"] > 0)


def test_norms(ops):
  x, epsilon = jnp.asarray(ops["norm_x"]), CONFIG.norm_epsilon
  got = layers.rms_norm(x, jnp.asarray(ops["rms_w"]), epsilon)
  assert_matches(ops, "rms_y", got)
  scale, bias = jnp.asarray(ops["ln_w"]), jnp.asarray(ops["ln_b"])
  assert_matches(ops, "ln_y", layers.layer_norm(x, scale, bias, epsilon))
