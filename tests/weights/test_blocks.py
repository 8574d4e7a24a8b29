"""Float8 weight blocks: against the kernels' definition, and exactness."""

import ml_dtypes
import numpy as np
import pytest

from dsv32_jax.weights import blocks
from pallas_kernels import fp8

SHAPES = [(1, 1), (128, 128), (144, 200), (300, 129), (5, 640)]


def random_float8(shape, seed):
  """All finite values of e4m3, NaN left out."""
  codes = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
  codes[codes % 128 == 127] = 126
  return codes.view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_kernels(shape):
  weight = np.random.default_rng(0).standard_normal(shape, np.float32)
  values, scale = blocks.quantize(weight)
  want_values, want_scale = fp8.quantize_blocks(weight)
  np.testing.assert_array_equal(scale, np.asarray(want_scale))
  np.testing.assert_array_equal(
    values.view(np.uint8), np.asarray(want_values).view(np.uint8)
  )
  np.testing.assert_array_equal(
    blocks.dequantize(values, scale),
    np.asarray(fp8.dequantize_blocks(want_values, want_scale)),
  )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [-60, -24, 0, 40])
def test_requantising_loses_nothing(shape, largest):
  values = random_float8(shape, 1)
  rng = np.random.default_rng(2)
  grid = (-(-shape[0] // 128), -(-shape[1] // 128))
  scale = np.ldexp(np.float32(1), rng.integers(largest - 8, largest, grid))
  weight = blocks.dequantize(values, scale)
  again = blocks.dequantize(*blocks.quantize(weight))
  assert again.tobytes() == weight.tobytes()
  narrow = weight.astype(ml_dtypes.bfloat16)
  again = blocks.dequantize(*blocks.quantize(narrow))
  assert again.tobytes() == weight.tobytes()


def test_dequantises_any_rows():
  values = random_float8((300, 140), 3)
  scale = np.ldexp(np.float32(1), np.arange(6).reshape(3, 2) - 3)
  whole = blocks.dequantize(values, scale)
  want = values.astype(np.float64)
  want *= np.kron(scale, np.ones((128, 128)))[:300, :140]
  np.testing.assert_array_equal(whole, want)
  for first, last in [(0, 0), (0, 128), (100, 300), (129, 130), (255, 257)]:
    part = blocks.dequantize(values[first:last], scale, first)
    np.testing.assert_array_equal(part, whole[first:last])


def test_special_weights():
  weight = np.zeros((130, 130), np.float32)
  weight[0, 0] = -0.0
  weight[0, 129] = 1e-44
  values, scale = blocks.quantize(weight)
  assert (scale > 0).all()
  assert (
    blocks.dequantize(values, scale)[0, 0].tobytes() == weight[0, 0].tobytes()
  )
  weight[1, 1] = 3e38
  values, scale = blocks.quantize(weight)
  assert np.isfinite(values.astype(np.float32)).all()
  for bad in (np.nan, np.inf, -np.inf):
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
      blocks.quantize(weight)
