"""Block-scaled float8_e4m3fn: the official quantisation, bit for bit.

Activations share one scale per row and block of 128 columns, weights one per
block of 128 x 128 (DeepSeek-V3 section 3.3.2; the V3.2 inference code). Values
are divided by the scale, clipped to +-448 and rounded to nearest even; the clip
comes before the cast, which would turn anything past 448 into NaN.
"""
# M rows, D columns, O weight rows, L blocks of columns, P blocks of weight
# rows, J columns in a block

import jax
import jax.numpy as jnp
import numpy as np

FLOAT8_MAX = 448.0
AMAX_FLOOR = 1e-4
BLOCK = 128


def quantize(x, *, block=BLOCK, power_of_two=True):
  """Quantises [..., D] per row and `block` columns.

  Returns float8_e4m3fn values [..., D] and float32 scales [..., ceil(D/block)]
  with x ~ values * scale. `power_of_two` rounds scales up to a power of two
  (ue8m0), exactly, on the bit pattern. Blocks of tiny values get the scale of
  an absolute maximum of 1e-4.
  """
  if block < 1 or x.ndim < 1:
    raise ValueError(f"{block=} {x.shape=} need block >= 1 and one axis")
  blocks = _blocked(x.astype(jnp.float32), block)
  amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), AMAX_FLOOR)
  scales = _scale(amax, power_of_two)
  values = _cast(blocks / scales[..., None])
  values = values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
  return values, scales


def dequantize(values, scales, *, block=BLOCK):
  """Multiplies [..., D] values by their block's scale; returns float32."""
  if scales.shape != (*values.shape[:-1], -(-values.shape[-1] // block)):
    raise ValueError(f"{scales.shape=} does not fit {values.shape=} {block=}")
  wide = jnp.repeat(scales, block, axis=-1)[..., : values.shape[-1]]
  return values.astype(jnp.float32) * wide


def quantize_blocks(weight_OD, *, power_of_two=True):
  """Quantises a weight [O,D] in blocks of 128 x 128, partial ones included.

  Returns float8_e4m3fn [O,D] and float32 `scale_inv` [ceil(O/128),
  ceil(D/128)], which the values are multiplied by to get the weight back.
  """
  if weight_OD.ndim != 2:
    raise ValueError(f"{weight_OD.shape=} must be [out,in]")
  rows, columns = weight_OD.shape
  padded = jnp.pad(
    weight_OD.astype(jnp.float32), [(0, -rows % BLOCK), (0, -columns % BLOCK)]
  )
  tiles = padded.reshape(-(-rows // BLOCK), BLOCK, -(-columns // BLOCK), BLOCK)
  amax_PL = jnp.maximum(jnp.max(jnp.abs(tiles), axis=(1, 3)), AMAX_FLOOR)
  scale_inv_PL = _scale(amax_PL, power_of_two)
  values = _cast(tiles / scale_inv_PL[:, None, :, None])
  return values.reshape(padded.shape)[:rows, :columns], scale_inv_PL


def dequantize_blocks(values_OD, scale_inv_PL):
  """Multiplies a weight [O,D] by its 128 x 128 block scales; float32."""
  return values_OD.astype(jnp.float32) * _spread(values_OD, scale_inv_PL)


def matmul(values_MD, scales_ML, weight_OD, scale_inv_PL):
  """Multiplies quantised rows [M,D] by a quantised weight [O,D]; [M,O] float32.

  Each block of 128 columns is a float32 dot product, times both scales, added
  in float32.
  """
  blocks = -(-values_MD.shape[-1] // BLOCK)
  if weight_OD.shape[-1] != values_MD.shape[-1]:
    raise ValueError(f"{weight_OD.shape=} does not fit {values_MD.shape=}")
  if scales_ML.shape != (*values_MD.shape[:-1], blocks):
    raise ValueError(f"{scales_ML.shape=} does not fit {values_MD.shape=}")
  values_MLJ = _blocked(values_MD.astype(jnp.float32), BLOCK)
  weight_OLJ = _blocked(weight_OD.astype(jnp.float32), BLOCK)
  dots_MOL = jnp.einsum(
    "...LJ,OLJ->...OL",
    values_MLJ,
    weight_OLJ,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  scale_OL = _spread_rows(weight_OD, scale_inv_PL)
  return jnp.sum(dots_MOL * (scales_ML[..., None, :] * scale_OL), axis=-1)


def hadamard(x):
  """Applies the orthonormal Hadamard transform (Sylvester) to the last axis.

  The last axis must be a power of two. Sums in float32, returns x.dtype.
  """
  width = x.shape[-1]
  if width < 1 or width & (width - 1):
    raise ValueError(f"{x.shape=} must end in a power of two")
  signs = np.ones((1, 1), np.float32)
  while signs.shape[0] < width:
    signs = np.block([[signs, signs], [signs, -signs]])
  # A product with +-1 is exact, so only the float32 sums round.
  sums = jnp.matmul(
    x.astype(jnp.float32), signs, precision=jax.lax.Precision.HIGHEST
  )
  return (sums * np.float32(width**-0.5)).astype(x.dtype)


def _scale(amax, power_of_two):
  """Returns amax / 448, rounded up to a power of two if asked; float32."""
  if not power_of_two:
    # The official kernel multiplies by the rounded reciprocal.
    return amax * np.float32(1.0 / FLOAT8_MAX)
  # 448 is 1.75 * 2^8, so amax / 448 exceeds the power of two that is 8 below
  # amax's own exactly if amax's mantissa exceeds 1.75.
  bits = jax.lax.bitcast_convert_type(amax, jnp.uint32)
  exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)
  return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _cast(scaled):
  clipped = jnp.clip(scaled, -FLOAT8_MAX, FLOAT8_MAX)
  return clipped.astype(jnp.float8_e4m3fn)


def _blocked(x, block):
  """Zero-pads the last axis and splits it into blocks: [..., L, block]."""
  padding = -x.shape[-1] % block
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
  return padded.reshape(*x.shape[:-1], -1, block)


def _spread_rows(weight_OD, scale_inv_PL):
  """Repeats block scales over rows: [O,L]."""
  rows, columns = weight_OD.shape
  if scale_inv_PL.shape != (-(-rows // BLOCK), -(-columns // BLOCK)):
    raise ValueError(f"{scale_inv_PL.shape=} does not fit {weight_OD.shape=}")
  return jnp.repeat(scale_inv_PL, BLOCK, axis=0)[:rows]


def _spread(weight_OD, scale_inv_PL):
  """Repeats block scales over rows and columns: [O,D]."""
  scale_OL = _spread_rows(weight_OD, scale_inv_PL)
  return jnp.repeat(scale_OL, BLOCK, axis=1)[:, : weight_OD.shape[1]]
