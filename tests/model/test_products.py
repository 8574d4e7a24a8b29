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
# Of which a mesh splits some partly and some not at all.
ODD = dict(B=3, T=5, D=6, U=10, H=2, V=3, F=6)
PRODUCTS = {
  "query_down": ("BTD,DU->BTU", ("embed", "query_latent")),
  "query_up": ("BTU,UHV->BTHV", ("query_latent", "heads", None)),
  "output": ("BTHV,HVD->BTD", ("heads", None, "embed")),
  "up": ("BTD,DF->BTF", layers.WIDE),
  "down": ("BTF,FD->BTD", layers.NARROW),
}


def operands(equation, sizes=SIZES):
  """A product's x, weight and direction of the result, float64."""
  random = np.random.default_rng(0)
  letters = equation.replace("->", ",").split(",")
  return [random.normal(size=[sizes[x] for x in part]) for part in letters]


def gradient_step(equation, axes, mesh, arrays, argnums):
  """Compiles out and gradients: x's is 0, weight's 1; places the arrays."""

  def run(x, weight, direction):
    def value(x, weight):
      out = layers.product(equation, x, weight, axes)
      return jnp.sum(out * direction), out

    return jax.grad(value, argnums, has_aux=True)(x, weight)

  x, weight, direction = (jnp.asarray(a, jnp.float32) for a in arrays)
  spec = sharding.partition_spec(weight.shape, axes, mesh)
  weight = jax.device_put(weight, jax.NamedSharding(mesh, spec))
  compiled = jax.jit(run).lower(x, weight, direction).compile()
  return compiled, compiled(x, weight, direction)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=["even", "odd"])
@pytest.mark.parametrize(
  "axes",
  [
    dict(data=2, fsdp=2, context=2),
    dict(fsdp=2, context=2, tensor=2),
    dict(expert=2, tensor=4),
  ],
  ids=lambda axes: "_".join(f"{axis}{size}" for axis, size in axes.items()),
)
def test_a_product_on_a_mesh_is_numpys(name, axes, sizes):
  equation, of_weight = PRODUCTS[name]
  arrays = operands(equation, sizes)
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices()[:8])
  with jax.set_mesh(mesh):
    _, (gradients, out) = gradient_step(
      equation, of_weight, mesh, arrays, (0, 1)
    )
  x, weight, direction = arrays
  of_x, of_w, of_out = equation.replace("->", ",").split(",")
  for got, wanted in (
    (out, np.einsum(equation, x, weight)),
    (gradients[0], np.einsum(f"{of_out},{of_w}->{of_x}", direction, weight)),
    (gradients[1], np.einsum(f"{of_x},{of_out}->{of_w}", x, direction)),
  ):
    np.testing.assert_allclose(got, wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gradient_is_summed_in_shares(name):
  """Scattered over the devices that store the weight, then summed over data."""
  equation, axes = PRODUCTS[name]
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=2, fsdp=2, context=2), jax.devices()[:8]
  )
  arrays = operands(equation)
  with jax.set_mesh(mesh):
    compiled, _ = gradient_step(equation, axes, mesh, arrays, 1)
  found = hlo.traffic(compiled.as_text(), 8)
  weight = 4 * arrays[1].size
  assert found.bytes["all-reduce"] == weight // 4
  assert found.bytes["reduce-scatter"] == weight * 3 // 4
  assert found.instructions["reduce-scatter"] == 1


@pytest.mark.parametrize(
  "axes, gathers",
  [
    (dict(data=2, fsdp=2, context=2), 1),
    # Never over all devices at once.
    (dict(fsdp=2, context=4), 2),
  ],
)
def test_a_weight_is_gathered_at_once(axes, gathers):
  equation, of_weight = PRODUCTS["up"]
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices()[:8])
  with jax.set_mesh(mesh):
    compiled, _ = gradient_step(
      equation, of_weight, mesh, operands(equation), 1
    )
  text = compiled.as_text()
  assert hlo.traffic(text, 8).instructions["all-gather"] == gathers
  assert hlo.most_gathered(text, 8) == 4


@pytest.mark.parametrize(
  "axes, gathers",
  [
    (dict(data=2, fsdp=2, context=2), 1),
    # Each device has columns of its own, which lie apart in the two.
    (dict(fsdp=2, context=2, tensor=2), 2),
    (dict(data=8), 0),
  ],
)
def test_products_of_the_same_tokens_share_a_gather(axes, gathers):
  random = np.random.default_rng(1)
  x, *weights = [
    random.normal(size=shape) for shape in ((4, 8, 16), (16, 8), (16, 24))
  ]
  directions = [random.normal(size=(4, 8, w.shape[1])) for w in weights]

  def run(x, weights):
    def value(x, weights):
      outs = layers.products(x, weights, (layers.WIDE, layers.WIDE))
      return sum(jnp.sum(o * d) for o, d in zip(outs, directions)), outs

    return jax.grad(value, (0, 1), has_aux=True)(x, weights)

  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices()[:8])
  placed = [
    jax.device_put(
      jnp.asarray(w, jnp.float32),
      jax.NamedSharding(
        mesh, sharding.partition_spec(w.shape, layers.WIDE, mesh)
      ),
    )
    for w in weights
  ]
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(jnp.asarray(x, jnp.float32), placed).compile()
    (d_x, d_weights), outs = compiled(jnp.asarray(x, jnp.float32), placed)
  wanted = [x @ w for w in weights]
  d_wanted = [np.einsum("BTX,BTY->XY", x, d) for d in directions]
  for got, want in zip([*outs, *d_weights], [*wanted, *d_wanted]):
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)
  of_x = sum(d @ w.T for d, w in zip(directions, weights))
  np.testing.assert_allclose(d_x, of_x, rtol=RTOL, atol=ATOL)
  found = hlo.traffic(compiled.as_text(), 8).instructions
  for kind in ("all-gather", "reduce-scatter"):
    assert found.get(kind, 0) == gathers
