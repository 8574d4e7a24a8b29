"""Block-scaled fp8 against numpy, math.frexp and ml_dtypes' cast."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import fp8
from tests.support.tolerances import TOLERANCE

SHAPES = [(3, 128), (2, 5, 100), (4, 300), (1, 1)]


def numpy_scale(amax, power_of_two):
  """One scale from one block's absolute maximum, in Python floats."""
  amax = max(np.float32(amax), np.float32(1e-4))
  plain = np.float32(amax * np.float32(1 / 448))
  if not power_of_two:
    return plain
  mantissa, exponent = math.frexp(plain)
  return np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def numpy_cast(values):
  return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def numpy_quantize(x, block, power_of_two):
  rows = x.reshape(-1, x.shape[-1])
  values = np.zeros(rows.shape, ml_dtypes.float8_e4m3fn)
  scales = np.zeros((len(rows), -(-x.shape[-1] // block)), np.float32)
  for m, l in np.ndindex(scales.shape):
    part = rows[m, l * block : (l + 1) * block]
    scales[m, l] = numpy_scale(np.abs(part).max(), power_of_two)
    values[m, l * block : (l + 1) * block] = numpy_cast(part / scales[m, l])
  return values.reshape(x.shape), scales.reshape(*x.shape[:-1], -1)


def random_values(shape, seed=0):
  """Values over many magnitudes, zeros and one row of exact powers of two."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * 10.0 ** rng.integers(-7, 4, shape)
  x[0, ...] = 2.0 ** rng.integers(-3, 9, shape[1:])
  return np.where(rng.random(shape) < 0.1, 0.0, x).astype(np.float32)


def bits(x):
  return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [128, 32])
def test_quantize_is_bit_exact(shape, power_of_two, block):
  x = random_values(shape)
  quantize = jax.jit(fp8.quantize, static_argnames=("block", "power_of_two"))
  values, scales = quantize(x, block=block, power_of_two=power_of_two)
  want_values, want_scales = numpy_quantize(x, block, power_of_two)
  np.testing.assert_array_equal(bits(values), bits(want_values))
  np.testing.assert_array_equal(scales, want_scales)


@pytest.mark.parametrize("amax", [448.0, 448.0 * 2, 447.9, 449.0, 1e-9, 3e38])
def test_scale_covers_the_largest_value(amax):
  x = np.array([[amax, -amax / 3, 0.0]], np.float32)
  values, scales = fp8.quantize(x)
  assert not np.isnan(np.asarray(values, np.float32)).any()
  assert np.asarray(scales)[0, 0] == numpy_scale(amax, True)
  assert np.abs(np.asarray(values, np.float32)).max() <= 448


def test_quantize_keeps_nan_visible():
  values, scales = fp8.quantize(np.array([[1.0, np.nan]], np.float32))
  restored = fp8.dequantize(values, scales)
  assert np.isnan(restored).any()


def test_dequantize_inverts_within_rounding():
  x = random_values((6, 300))
  values, scales = fp8.quantize(x)
  restored = np.asarray(fp8.dequantize(values, scales))
  wide = np.repeat(np.asarray(scales), 128, axis=-1)[:, :300]
  # e4m3 has 3 mantissa bits, and steps of 2^-9 below 2^-6.
  assert (np.abs(restored - x) <= np.abs(x) / 16 + wide * 2.0**-10).all()


@pytest.mark.parametrize("shape", [(128, 128), (192, 256), (130, 257), (3, 5)])
def test_quantize_blocks_is_bit_exact(shape):
  weight_OD = random_values(shape, seed=2)
  values, scale_inv = fp8.quantize_blocks(weight_OD)
  restored = fp8.dequantize_blocks(values, scale_inv)
  assert scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
  for o, d in np.ndindex(scale_inv.shape):
    tile = np.s_[o * 128 : (o + 1) * 128, d * 128 : (d + 1) * 128]
    scale = numpy_scale(np.abs(weight_OD[tile]).max(), True)
    want = numpy_cast(weight_OD[tile] / scale)
    assert scale_inv[o, d] == scale
    np.testing.assert_array_equal(bits(values)[tile], bits(want))
    np.testing.assert_array_equal(restored[tile], want.astype("f4") * scale)


def test_matmul_equals_float64_product_of_dequantised():
  rng = np.random.default_rng(3)
  values, scales = fp8.quantize(rng.normal(size=(2, 3, 300)).astype("f4"))
  weight, scale_inv = fp8.quantize_blocks(
    rng.normal(size=(200, 300)).astype("f4"), power_of_two=False
  )
  a = np.asarray(fp8.dequantize(values, scales), np.float64)
  w = np.asarray(fp8.dequantize_blocks(weight, scale_inv), np.float64)
  got = fp8.matmul(values, scales, weight, scale_inv)
  assert got.dtype == jnp.float32
  rtol, atol = TOLERANCE["float32"]
  np.testing.assert_allclose(got, a @ w.T, rtol=rtol, atol=atol * 10)


@pytest.mark.parametrize("width", [1, 2, 64, 128])
def test_hadamard_is_the_sylvester_matrix(width):
  x = np.random.default_rng(4).normal(size=(3, width)).astype(np.float32)
  index = np.arange(width)
  ones = np.array([[bin(i & j).count("1") for j in index] for i in index])
  matrix = (-1.0) ** ones * width**-0.5
  rtol, atol = TOLERANCE["float32"]
  got = fp8.hadamard(x)
  np.testing.assert_allclose(got, x @ matrix, rtol=rtol, atol=atol)
  np.testing.assert_allclose(fp8.hadamard(got), x, rtol=rtol, atol=atol)


def test_wrong_shapes_are_named():
  with pytest.raises(ValueError, match="power of two"):
    fp8.hadamard(np.zeros((2, 12), np.float32))
  with pytest.raises(ValueError, match=r"scales\.shape"):
    fp8.dequantize(np.zeros((2, 12), np.float32), np.ones((2, 2), np.float32))
  with pytest.raises(ValueError, match=r"scale_inv_PL\.shape"):
    fp8.dequantize_blocks(np.zeros((2, 12)), np.ones((2, 2), np.float32))
