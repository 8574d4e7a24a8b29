"""The rules that map logical axes to a mesh."""

import jax
import pytest

from dsv32_jax import sharding


def mesh_of(**sizes):
  """Describes a mesh of devices that need not exist."""
  axes = dict.fromkeys(sharding.AXES, 1) | sizes
  return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize(
  ("shape", "axes", "expected"),
  [
    ((64, 8), ("embed", None), (("fsdp", "context"), None)),
    # A leading layer axis has no name.
    ((3, 64, 8), ("embed", None), (None, ("fsdp", "context"), None)),
    # 6 divides by fsdp and not by fsdp * context.
    ((6, 8), ("embed", None), (("fsdp",), None)),
    ((5, 8), ("embed", None), (None, None)),
    # One mesh axis splits one dimension, the first that can take it.
    ((64, 64), ("embed", "latent"), (("fsdp", "context"), None)),
    ((6, 64), ("embed", "latent"), (("fsdp",), ("context",))),
    ((5, 64), ("embed", "latent"), (None, ("fsdp", "context"))),
    ((16, 8), ("experts", "ffn"), (("expert",), ("tensor",))),
  ],
)
def test_partition_spec(shape, axes, expected):
  mesh = mesh_of(fsdp=2, expert=4, context=4, tensor=2)
  spec = sharding.partition_spec(shape, axes, mesh)
  assert spec == jax.sharding.PartitionSpec(*expected)


def test_axis_of_one_device_is_not_named():
  spec = sharding.partition_spec((64, 8), ("embed", "ffn"), mesh_of(context=4))
  assert spec == jax.sharding.PartitionSpec(("context",), None)
