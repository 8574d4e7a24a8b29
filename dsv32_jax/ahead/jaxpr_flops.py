"""Floating point operations of the matrix products that a program runs.

Read from its jaxpr: recomputation, padding and hidden tiles included, so what a
program costs beside what `flops` says its mathematics needs. Scans count as
often as they run, a `shard_map` once a device, a Pallas kernel as it estimates
itself or else once a step of its grid. Of branches the dearest counts, so a
skipped tile is not credited; a loop that runs as often as the data need counts
once.
"""

import math

from jax.extend import core


def count(jaxpr) -> float:
  """Counts a program's matrix products.

  Args:
    jaxpr: closed or not, as `jax.jit(f).trace(...).jaxpr`.

  Returns:
    Operations over all devices; a multiplication and an addition are two.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot(equation, params["dimension_numbers"], ())
  if name in ("ragged_dot_general", "ragged_dot"):
    numbers = params["ragged_dot_dimension_numbers"]
    return _dot(
      equation,
      numbers.dot_dimension_numbers,
      numbers.rhs_group_dimensions,
    )
  if name == "scan":
    return params["length"] * count(params["jaxpr"])
  if name == "while":
    return count(params["body_jaxpr"])
  if name == "cond":
    return max(map(count, params["branches"]))
  inner = sum(map(count, _jaxprs(params)))
  if name == "shard_map":
    axes, mesh = params["newly_manual_axes"], params["mesh"]
    return math.prod(mesh.shape[axis] for axis in axes) * inner
  if name == "pallas_call":
    if params["cost_estimate"] is not None:
      return params["cost_estimate"].flops
    return math.prod(params["grid_mapping"].grid) * inner
  return inner


def _dot(equation, numbers, group_axes) -> float:
  """Every entry of the left side meets each free entry of the right one."""
  (_, contracted), (_, batch) = numbers
  left, right = (var.aval.shape for var in equation.invars[:2])
  taken = {*contracted, *batch, *group_axes}
  free = (size for axis, size in enumerate(right) if axis not in taken)
  return 2.0 * math.prod(left) * math.prod(free)


def _jaxprs(params) -> list:
  """Jaxprs among an equation's parameters."""
  kinds = (core.Jaxpr, core.ClosedJaxpr)
  found = []
  for value in params.values():
    values = value if isinstance(value, (tuple, list)) else (value,)
    found += [x for x in values if isinstance(x, kinds)]
  return found
