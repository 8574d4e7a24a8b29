"""Fresh weights, made on the host a matrix at a time.

Drawing them with numpy compiles nothing, holds one matrix beside the model, and
gives the same weights whatever the mesh: each matrix has a generator of its
own, named by the seed, the parameter, the layer and the expert.
"""

import itertools
import math
import zlib

from flax import nnx
import jax
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import transformer


def abstract_model(
  config: config_lib.ModelConfig, *, dtype, compute_dtype=None
) -> transformer.Transformer:
  """Describes a model without allocating it."""
  return nnx.eval_shape(
    lambda: transformer.Transformer(
      config, rngs=nnx.Rngs(0), dtype=dtype, compute_dtype=compute_dtype
    )
  )


def fresh_model(
  config: config_lib.ModelConfig,
  *,
  seed: int,
  dtype,
  compute_dtype=None,
  mesh=None,
) -> transformer.Transformer:
  """Makes an initialised model, each parameter straight in its sharding.

  Weights are normal with the config's standard deviation, norm scales 1,
  biases 0.

  Args:
    config: the model's shape.
    seed: names the weights.
    dtype: type of the parameters; what is always float32 stays so.
    compute_dtype: type of the activations; None takes `dtype`.
    mesh: mesh to lay it on, or None for the first device.
  """
  graph, abstract = nnx.split(
    abstract_model(config, dtype=dtype, compute_dtype=compute_dtype)
  )
  filled = [
    (path, variable.replace(_fill(path, variable, config, seed)))
    for path, variable in nnx.to_flat_state(sharding.placed(abstract, mesh))
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def _fill(path, variable, config, seed):
  """Makes one parameter's array; each device asks for its own part."""
  target = variable.get_value()
  axes = variable.get_metadata().get("axes", ())
  # Leading layers and experts are apart: a matrix is what follows them.
  apart = len(target.shape) - len(axes) if axes else 0
  apart += bool(axes) and axes[0] == "experts"
  shape = target.shape[apart:]

  def draw(place):
    if len(axes) < 2:
      return np.float32(path[-1] == "scale")
    return _normal(path, place, shape, config, seed)

  def part(index):
    ranges = [range(*s.indices(n)) for s, n in zip(index, target.shape)]
    sizes = [len(r) for r in ranges]
    whole = np.empty((math.prod(sizes[:apart]), *sizes[apart:]), target.dtype)
    for row, place in zip(whole, itertools.product(*ranges[:apart])):
      value = draw(place)
      row[...] = value if value.ndim == 0 else value[tuple(index[apart:])]
    return whole.reshape(sizes)

  return jax.make_array_from_callback(target.shape, target.sharding, part)


def _normal(path, place, shape, config, seed):
  name = zlib.crc32("/".join(map(str, path)).encode())
  generator = np.random.Generator(np.random.Philox((seed, name, *place)))
  values = generator.standard_normal(shape, np.float32)
  return values * np.float32(config.initializer_scale)
