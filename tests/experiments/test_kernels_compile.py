"""What experiments.kernels_compile compiles alone."""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from experiments import kernels_compile


def doubled(x, name):
  def body(x_ref, out_ref):
    out_ref[...] = 2.0 * x_ref[...]

  return pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    interpret=True,
    name=name,
  )(x)


def test_kernels_are_found_wherever_they_are():
  def function(arrays):
    first = doubled(jnp.sin(arrays["a"]), "first")
    again = doubled(first + 1.0, "first")
    summed, _ = jax.lax.scan(
      lambda carry, x: (carry + doubled(x, "second").sum(), None),
      jax.jit(jnp.sum)(again),
      arrays["b"],
    )
    return jax.lax.cond(
      summed > 0, lambda x: doubled(x, "third"), jnp.cos, arrays["b"]
    )

  arrays = {
    "a": jax.ShapeDtypeStruct((3,), jnp.float32),
    "b": jax.ShapeDtypeStruct((2, 5), jnp.float32),
  }
  kernels, arguments = kernels_compile.kernels_of(function, arrays)
  assert [[x.shape for x in types] for types in arguments] == [
    [(3,)],
    [(5,)],
    [(2, 5)],
  ]
  drawn = [
    [jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)] for [x] in arguments
  ]
  for [got], [x] in zip(kernels(drawn), drawn, strict=True):
    np.testing.assert_array_equal(got, 2 * x)
