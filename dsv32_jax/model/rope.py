"""Rotary position embedding with YaRN, in the two layouts the model uses.

Multi-head latent attention rotates neighbouring pairs (2i, 2i+1), the indexer
rotates (i, i + R/2). The same frequencies serve both.
"""

import math

import jax.numpy as jnp
import numpy as np

from dsv32_jax.model import config as config_lib

# B batch, T tokens, P pairs of the rotary width, X any leading axes


def frequencies(rope_width: int, rope: config_lib.RopeConfig) -> np.ndarray:
  """Returns the R/2 angular frequencies in radians a token, float32.

  YaRN (Peng et al. 2023, section 3.2): frequencies that turn more than
  beta_fast times within original_length stay, those that turn less than
  beta_slow times are divided by factor, a linear ramp lies between.
  """
  pair_P = np.arange(0, rope_width, 2, dtype=np.float32) / rope_width
  # A last bit here is a hundredth of a radian at position 160K. The power is
  # rounded once and the ramp mixed in the official order, to the same bits.
  power_P = (rope.theta ** pair_P.astype(np.float64)).astype(np.float32)
  base_P = np.float32(1.0) / power_P
  if rope.factor <= 1:
    return base_P

  def pair_of(turns: float) -> float:
    ratio = rope.original_length / (turns * 2 * math.pi)
    return rope_width * math.log(ratio) / (2 * math.log(rope.theta))

  low = max(math.floor(pair_of(rope.beta_fast)), 0)
  high = min(math.ceil(pair_of(rope.beta_slow)), rope_width - 1)
  if low == high:
    high += 0.001
  index_P = np.arange(rope_width // 2, dtype=np.float32)
  ramp_P = np.clip((index_P - low) / (high - low), 0, 1).astype(np.float32)
  kept_P = 1 - ramp_P
  return base_P / np.float32(rope.factor) * (1 - kept_P) + base_P * kept_P


def rotation_tables(positions_BT, rope_width: int, rope: config_lib.RopeConfig):
  """Returns cos_BTP and sin_BTP, float32, P = rope_width / 2."""
  angles_BTP = positions_BT[..., None].astype(jnp.float32) * frequencies(
    rope_width, rope
  )
  return jnp.cos(angles_BTP), jnp.sin(angles_BTP)


def rotate_interleaved(x_BTXR, cos_BTP, sin_BTP):
  """Rotates pairs (2i, 2i+1) of the last axis; X is one axis or none."""
  cos, sin = _align(x_BTXR, cos_BTP, sin_BTP)
  pairs = x_BTXR.astype(jnp.float32).reshape(*x_BTXR.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
  return rotated.reshape(x_BTXR.shape).astype(x_BTXR.dtype)


def rotate_half_split(x_BTXR, cos_BTP, sin_BTP):
  """Rotates pairs (i, i + R/2) of the last axis; X is one axis or none."""
  cos, sin = _align(x_BTXR, cos_BTP, sin_BTP)
  first, second = jnp.split(x_BTXR.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTXR.dtype)


def _align(x, cos_BTP, sin_BTP):
  """Inserts a heads axis into the tables where x has one."""
  if x.ndim == cos_BTP.ndim + 1:
    return cos_BTP[:, :, None], sin_BTP[:, :, None]
  return cos_BTP, sin_BTP
