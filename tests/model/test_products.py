"""Products with weights that a mesh splits, and what their gradients move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.ahead import hlo
from dsv32_jax.model import layers
from tests.support import tolerances

RTOL, ATOL = tolerances.TOLERANCE["float32"]
SIZES = dict(B=4, T=8, D=16, U=12, H=4, V=6, F=8)
PRODUCTS = {
  "query_down": ("BTD,DU->BTU", ("embed", "query_latent")),
  "query_up": ("BTU,UHV->BTHV", ("query_latent", "heads", None)),
  "output": ("BTHV,HVD->BTD", ("heads", None, "embed")),
  "up": ("BTD,DF->BTF", layers.WIDE),
  "down": ("BTF,FD->BTD", layers.NARROW),
}


def operands(equation):
  """A product's x, weight and direction of the result, float64."""
  random = np.random.default_rng(0)
  letters = equation.replace("->", ",").split(",")
  return [random.normal(size=[SIZES[x] for x in part]) for part in letters]


def gradient_step(equation, axes, mesh, arrays):
  """Compiles out and the weight's gradient; places the arrays."""

  def run(x, weight, direction):
    def value(weight):
      out = layers.product(equation, x, weight, axes)
      return jnp.sum(out * direction), out

    return jax.grad(value, has_aux=True)(weight)

  x, weight, direction = (jnp.asarray(a, jnp.float32) for a in arrays)
  spec = sharding.partition_spec(weight.shape, axes, mesh)
  weight = jax.device_put(weight, jax.NamedSharding(mesh, spec))
  compiled = jax.jit(run).lower(x, weight, direction).compile()
  return compiled, compiled(x, weight, direction)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
  "axes",
  [
    dict(data=2, fsdp=2, context=2),
    dict(fsdp=2, context=2, tensor=2),
    dict(expert=2, tensor=4),
  ],
  ids=lambda axes: "_".join(f"{axis}{size}" for axis, size in axes.items()),
)
def test_a_product_on_a_mesh_is_numpys(name, axes):
  equation, of_weight = PRODUCTS[name]
  arrays = operands(equation)
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices()[:8])
  with jax.set_mesh(mesh):
    _, (gradient, out) = gradient_step(equation, of_weight, mesh, arrays)
  x, weight, direction = arrays
  of_x, of_w, of_out = equation.replace("->", ",").split(",")
  wanted = np.einsum(f"{of_x},{of_out}->{of_w}", x, direction)
  np.testing.assert_allclose(
    out, np.einsum(equation, x, weight), rtol=RTOL, atol=ATOL
  )
  np.testing.assert_allclose(gradient, wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gradient_is_summed_in_shares(name):
  """Scattered over the devices that store the weight, then summed over data."""
  equation, axes = PRODUCTS[name]
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=2, fsdp=2, context=2), jax.devices()[:8]
  )
  arrays = operands(equation)
  with jax.set_mesh(mesh):
    compiled, _ = gradient_step(equation, axes, mesh, arrays)
  moved = hlo.traffic(compiled.as_text(), 8).bytes
  weight = 4 * arrays[1].size
  assert moved["all-reduce"] == weight // 4
  assert moved["reduce-scatter"] == weight * 3 // 4
