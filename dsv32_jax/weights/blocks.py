"""Block-scaled float8 weights on the host: 128 x 128 blocks, exact both ways.

The arithmetic is that of `pallas_kernels.fp8`, in numpy, a band of 128 rows at
a time, because a checkpoint passes through host memory tensor by tensor and a
device should not see it before it has its final type. One thing differs: the
scale of a block of tiny weights is not held up at an absolute maximum of 1e-4,
which for activations costs nothing and for weights would lose bits.
"""

import ml_dtypes
import numpy as np

# O weight rows, D columns, P blocks of rows, L blocks of columns

BLOCK = 128
_FLOAT8 = ml_dtypes.float8_e4m3fn
_FLOAT8_MAX = np.float32(448.0)


def dequantize(
  values_OD: np.ndarray, scale_inv_PL: np.ndarray, first_row: int = 0
) -> np.ndarray:
  """Multiplies rows of a float8 weight by their block scales; float32 [O,D].

  Args:
    values_OD: rows `first_row` and on of the weight.
    scale_inv_PL: scales of the whole weight.
    first_row: place of the first row in the weight.
  """
  rows, columns = values_OD.shape
  out_OD = np.empty((rows, columns), np.float32)
  start = 0
  while start < rows:
    block = (first_row + start) // BLOCK
    stop = min(rows, (block + 1) * BLOCK - first_row)
    scale_D = np.repeat(scale_inv_PL[block], BLOCK)[:columns]
    out_OD[start:stop] = values_OD[start:stop]
    out_OD[start:stop] *= scale_D
    start = stop
  return out_OD


def quantize(weight_OD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Quantises a weight with the smallest power-of-two scales that fit.

  Weights that are float8 times a power of two of at least that size, as those
  of a loaded checkpoint with ue8m0 scales are, come back bit for bit.

  Returns:
    float8_e4m3fn values [O,D] and float32 scales [ceil(O/128), ceil(D/128)],
    which the values are multiplied by to get the weight back.

  Raises:
    ValueError: a weight is not finite.
  """
  rows, columns = weight_OD.shape
  steps = np.arange(0, columns, BLOCK)
  values_OD = np.empty((rows, columns), _FLOAT8)
  scale_inv_PL = np.empty((-(-rows // BLOCK), len(steps)), np.float32)
  for block, start in enumerate(range(0, rows, BLOCK)):
    band_OD = weight_OD[start : start + BLOCK].astype(np.float32)
    amax_D = np.max(np.abs(band_OD), axis=0)
    amax_L = np.maximum.reduceat(amax_D, steps)
    if not np.isfinite(amax_L).all():
      raise ValueError("a weight is not finite and cannot be float8")
    scale_L = _power_of_two(amax_L)
    band_OD /= np.repeat(scale_L, BLOCK)[:columns]
    # The cast would turn anything past 448 into NaN.
    np.clip(band_OD, -_FLOAT8_MAX, _FLOAT8_MAX, out=band_OD)
    values_OD[start : start + BLOCK] = band_OD
    scale_inv_PL[block] = scale_L
  return values_OD, scale_inv_PL


def _power_of_two(amax_L: np.ndarray) -> np.ndarray:
  """Returns amax / 448 rounded up to a power of two; 1 for a block of 0."""
  mantissa_L, exponent_L = np.frexp(amax_L / _FLOAT8_MAX)
  # frexp gives a mantissa in [0.5, 1): 0.5 is a power of two already.
  exponent_L = np.where(mantissa_L == 0.5, exponent_L - 1, exponent_L)
  scale_L = np.ldexp(np.float32(1), np.maximum(exponent_L, -126))
  return np.where(amax_L == 0, np.float32(1), scale_L).astype(np.float32)
