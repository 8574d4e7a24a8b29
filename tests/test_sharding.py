"""The rules that map logical axes to a mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.ahead import hlo


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


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2}, {"tensor": 4}])
def test_a_gathered_weight_has_the_gradient_of_a_whole_one(axes):
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=2, **axes), jax.devices()[:8]
  )
  keys = jax.random.split(jax.random.key(0), 2)
  x_BTD = jax.random.normal(keys[0], (4, 4, 8))
  weight_DF = jax.random.normal(keys[1], (8, 4))

  def loss(weight_DF, how):
    def run(x_BTD, weight_DF):
      assert weight_DF.shape == (8, 4)
      return (jnp.einsum("BTD,DF->BTF", x_BTD, weight_DF),)

    tokens = ("batch", "queries", None)
    (out_BTF,) = sharding.shard_call(
      run, (x_BTD, weight_DF), (tokens, how), (tokens,)
    )
    return jnp.sum(jnp.sin(out_BTF))

  wanted = jax.grad(loss)(weight_DF, (None, None))
  gathered = sharding.Gathered(("embed", "ffn"), (None, None))
  with jax.set_mesh(mesh):
    layout = sharding.partition_spec((8, 4), ("embed", "ffn"), mesh)
    placed = jax.device_put(weight_DF, jax.NamedSharding(mesh, layout))
    step = jax.jit(jax.grad(loss), static_argnums=1)
    compiled = step.lower(placed, gathered).compile()
    found = compiled(placed)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  # What is summed whole is the device's own share, over `data`.
  counted = hlo.count(compiled.as_text())
  assert counted["reduce-scatter"] >= 1
  assert math.prod(found.sharding.shard_shape((8, 4))) == 8 * 4 // 4


def test_a_gathered_weight_travels_rounded():
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4), jax.devices()[:4])
  weight_DF = jnp.full((8, 4), 1 + 2.0**-10)
  how = sharding.Gathered(("embed", None), (None, None), jnp.bfloat16)
  with jax.set_mesh(mesh):
    (found,) = jax.jit(
      lambda w: sharding.shard_call(
        lambda w: (w,), (w,), (how,), ((None, None),)
      )
    )(weight_DF)
  assert found.dtype == jnp.float32 and np.all(found == 1)
