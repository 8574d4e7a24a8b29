"""Filling and reading arrays shard by shard, on one device and on several."""

import itertools

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dsv32_jax.weights import shards

SHAPE = (2, 4, 6, 3)


def layouts():
  devices = np.asarray(jax.devices()[:4]).reshape(2, 2)
  mesh = jax.sharding.Mesh(devices, ("x", "y"))
  return [
    jax.sharding.SingleDeviceSharding(jax.devices()[1]),
    jax.sharding.NamedSharding(mesh, PartitionSpec(None, "x", "y")),
    jax.sharding.NamedSharding(mesh, PartitionSpec("y", None, "x")),
    jax.sharding.NamedSharding(mesh, PartitionSpec(None, ("x", "y"))),
    jax.sharding.NamedSharding(mesh, PartitionSpec()),
  ]


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_fill_and_read(case, host_bytes):
  layout = layouts()[case]
  want = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
  filler = shards.Filler(SHAPE, np.float32, layout, host_bytes)
  for place in itertools.product(range(2), range(4)):
    pieces = filler.wanted(place)
    covered = sum(want[place][piece].size for piece in pieces)
    assert covered == want[place].size, "each piece once, none missing"
    for piece in pieces:
      filler.fill(place, piece, np.ascontiguousarray(want[place][piece]))
      filler.wait()
  array = filler.array()
  assert array.sharding == layout
  np.testing.assert_array_equal(array, want)
  np.testing.assert_array_equal(shards.read_slot(array, (1, 2)), want[1, 2])
  np.testing.assert_array_equal(shards.read_slot(array, ()), want)


def test_a_device_reads_only_its_slot():
  array = jax.device_put(np.arange(24).reshape(2, 3, 4), jax.devices()[2])
  slot = shards._extract(array, (1, 2))
  np.testing.assert_array_equal(slot, [20, 21, 22, 23])
  assert slot.devices() == {jax.devices()[2]}
