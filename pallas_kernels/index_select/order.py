"""float32 scores as int32 keys of the same order, for exact comparison."""

import jax
import jax.numpy as jnp

# Lower than every score: a key that a query may not see.
HIDDEN = -(2**31)
# Higher than every score.
NAN = 2**31 - 1


def encode(score):
  """Maps float32 to int32 of the same order; -0.0 becomes 0.0, NaN `NAN`."""
  bits = jax.lax.bitcast_convert_type(score, jnp.int32)
  ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
  ordered = jnp.where(score == 0.0, 0, ordered)
  return jnp.where(jnp.isnan(score), NAN, ordered)


def decode(ordered):
  """Inverts `encode`, but for NaN and the sign of zero."""
  bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
