"""Checksums of device arrays that do not depend on how they are sharded.

Every element's bits are mixed with its position and the results are added
modulo 2^32. Integer addition has no order, so any mesh gives the same sum, each
device reads only its own shard, and nothing is copied to the host. The mixing
is one to one: a change of a single element always changes the checksum; other
changes go unseen with a chance of about 2^-64.
"""

import math

import jax
import jax.numpy as jnp

_MULTIPLIER = 0x9E3779B1
_OFFSET = 0x85EBCA77


def checksums(arrays: dict[str, jax.Array]) -> dict[str, str]:
  """Returns 16 hexadecimal digits for each array.

  Args:
    arrays: jax arrays of at most 32-bit elements, bool included, no PRNG keys.

  Raises:
    ValueError: if an array's type is wider.
  """
  for name, array in arrays.items():
    if array.dtype.itemsize > 4:
      raise ValueError(f"{name}: {array.dtype=} is wider than 32 bits")
  sums = {}
  for name, array in arrays.items():
    # One after the other: sums over many CPU devices that are all under way
    # at once starve each other until XLA aborts.
    sums[name] = jax.block_until_ready(_checksum(array))
  return {
    name: f"{int(first):08x}{int(second):08x}"
    for name, (first, second) in jax.device_get(sums).items()
  }


@jax.jit
def _checksum(array):
  if array.dtype == jnp.bool_:
    words = array.astype(jnp.uint32)
  else:
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned)
    words = bits.astype(jnp.uint32)
  position = jnp.uint32(_OFFSET)
  for axis in range(array.ndim):
    stride = math.prod(array.shape[axis + 1 :]) * _MULTIPLIER % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    position = position + iota * jnp.uint32(stride)
  first = _mix(words + position)
  second = _mix(first ^ jnp.uint32(_OFFSET))
  return jnp.sum(first), jnp.sum(second)


def _mix(x):
  """The finaliser of MurmurHash3: one to one on 32 bits."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
