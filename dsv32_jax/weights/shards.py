"""Filling and reading parameters piece by piece, each device by itself.

A stacked parameter is far larger than any tensor of a checkpoint. It is
filled slot by slot in the memory of the devices that hold it: every device
gets the piece of a slot that its shard covers and writes it into a donated
buffer. No collective takes part, so the hosts of a pod read what they need
and nothing else. Reading goes the same way back.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Slices = tuple[slice, ...]


@functools.partial(jax.jit, donate_argnums=0)
def _insert(buffer, block, place):
  """Writes block at the stack index `place` of a shard, in its memory."""
  start = (*place, *(0,) * (buffer.ndim - len(place)))
  return jax.lax.dynamic_update_slice(
    buffer, block.reshape((1,) * len(place) + block.shape), start
  )


@jax.jit
def _extract(buffer, place):
  """Reads the slot at the stack index `place` of a shard."""
  for i in place:
    buffer = jax.lax.dynamic_index_in_dim(buffer, i, keepdims=False)
  return buffer


def _ranges(index: Slices, shape: tuple[int, ...]) -> Slices:
  """Makes every slice's first and last + 1 explicit."""
  return tuple(
    slice(*part.indices(size)[:2]) for part, size in zip(index, shape)
  )


def _local(index: Slices, place: tuple[int, ...]) -> tuple[int, ...] | None:
  """Returns a stack index within a shard, None where the shard lacks it."""
  local = tuple(i - part.start for i, part in zip(place, index))
  inside = all(part.start <= i < part.stop for i, part in zip(place, index))
  return local if inside else None


class Filler:
  """An array being filled, slot by slot, on the devices of this process.

  A shard of at most `host_bytes` is put together on the host and sent whole,
  which saves compiling an insertion for its shape.
  """

  def __init__(
    self,
    shape,
    dtype,
    sharding: jax.sharding.Sharding,
    host_bytes: int = 1 << 20,
  ):
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)
    self._sharding = sharding
    self._index = {
      device: _ranges(index, self.shape)
      for device, index in sharding.addressable_devices_indices_map(
        self.shape
      ).items()
    }
    shard_size = math.prod(sharding.shard_shape(self.shape))
    self._on_host = shard_size * self.dtype.itemsize <= host_bytes
    self._host: dict[jax.Device, np.ndarray] = {}
    self._buffers: dict[jax.Device, jax.Array] = {}

  def wanted(self, place: tuple[int, ...]) -> list[Slices]:
    """Returns the pieces of a slot that this process's devices hold."""
    pieces = {}
    for index in self._index.values():
      if _local(index, place) is not None:
        piece = index[len(place) :]
        pieces[tuple((part.start, part.stop) for part in piece)] = piece
    return list(pieces.values())

  def fill(self, place: tuple[int, ...], piece: Slices, block) -> None:
    """Writes a piece of a slot, numpy, on every device that holds it."""
    assert block.dtype == self.dtype, (block.dtype, self.dtype)
    for device, index in self._index.items():
      local = _local(index, place)
      if local is None or index[len(place) :] != piece:
        continue
      shard_shape = tuple(part.stop - part.start for part in index)
      if self._on_host:
        if device not in self._host:
          self._host[device] = np.zeros(shard_shape, self.dtype)
        self._host[device][local] = block
        continue
      placed = jax.device_put(block, device)
      if math.prod(shard_shape[: len(place)]) == 1:
        self._buffers[device] = placed.reshape(shard_shape)
        continue
      if device not in self._buffers:
        with jax.default_device(device):
          self._buffers[device] = jax.device_put(
            jnp.zeros(shard_shape, self.dtype), device
          )
      self._buffers[device] = _insert(self._buffers[device], placed, local)

  def wait(self) -> None:
    """Waits for the devices, so that host copies do not pile up."""
    jax.block_until_ready(list(self._buffers.values()))

  def array(self) -> jax.Array:
    """Returns the array; every slot must have been filled."""
    for device, shard in self._host.items():
      self._buffers[device] = jax.device_put(shard, device)
    return jax.make_array_from_single_device_arrays(
      self.shape,
      self._sharding,
      [self._buffers[device] for device in self._index],
    )


def read_slot(array: jax.Array, place: tuple[int, ...]) -> np.ndarray:
  """Copies one slot of a stacked parameter to the host, from any sharding.

  Raises:
    ValueError: another process holds a part of the array.
  """
  if not array.is_fully_addressable:
    raise ValueError(
      f"{array.sharding=} spans processes; write the checkpoint from one"
    )
  slot = np.empty(array.shape[len(place) :], array.dtype)
  done = set()
  for shard in array.addressable_shards:
    index = _ranges(shard.index, array.shape)
    piece = index[len(place) :]
    key = tuple((part.start, part.stop) for part in piece)
    local = _local(index, place)
    if local is not None and key not in done:
      slot[piece] = _copy_out(shard.data, local)
      done.add(key)
  return slot


def _copy_out(data: jax.Array, local: tuple[int, ...]) -> np.ndarray:
  """Reads a slot of one device's shard without moving the whole shard."""
  if next(iter(data.devices())).platform == "cpu":
    # The host sees this array without a copy.
    return np.asarray(data)[local]
  return np.asarray(_extract(data, local))
