"""The mesh: its axes, the rules that map logical axes to it, and shard_map.

Model code names logical axes only. This file alone knows the mesh. Axes:
`data` and `fsdp` split the batch, `expert` splits the experts and, outside
them, the batch, `context` splits the sequence, `fsdp` and `context` split the
weights and their moments, `tensor` splits heads and hidden widths. Inside the
attention all heads of a query stay together: `context` and `tensor` split its
queries.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis -> mesh axes, major first. An axis that is not listed is whole.
RULES = {
  "batch": ("data", "fsdp", "expert"),
  "length": ("context",),
  "queries": ("context", "tensor"),
  "vocab": ("tensor",),
  # Over context too: each device of a sequence holds its share of the weights.
  "embed": ("fsdp", "context"),
  "query_latent": ("fsdp", "context"),
  "latent": ("fsdp", "context"),
  "heads": ("tensor",),
  "ffn": ("tensor",),
  "experts": ("expert",),
  # Of a sampler's cache: what devices hold of it adds up.
  "pages": AXES,
}

# Axes by which weights are stored and that are whole where they are multiplied.
GATHERED = ("embed", "query_latent", "latent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; -1 on at most one axis takes the rest."""

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = [getattr(self, axis) for axis in AXES]
    for axis, size in zip(AXES, sizes):
      if size < 1 and size != -1:
        raise ValueError(f"mesh.{axis}={size} must be positive or -1")
    if sizes.count(-1) > 1:
      raise ValueError(f"mesh={sizes} has more than one -1")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Builds the mesh over `devices` (default: all of them).

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [getattr(config, axis) for axis in AXES]
  if -1 in sizes:
    known = -math.prod(sizes)
    if len(devices) % known:
      raise ValueError(f"mesh={sizes} does not divide {len(devices)} devices")
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise ValueError(
      f"mesh={dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, there"
      f" are {len(devices)}"
    )
  grid = np.asarray(devices).reshape(sizes)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(shape, axes, mesh) -> PartitionSpec:
  """Maps logical axes to mesh axes where the sizes divide.

  A mesh axis splits one dimension: the first that asks for it and divides.

  Args:
    shape: array sizes; one longer than `axes` means a leading layer axis.
    axes: logical names or None, one a dimension.
    mesh: a mesh or an abstract mesh.
  """
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
  entries, used = [], set()
  for size, name in zip(shape, axes):
    mesh_axes = [
      a for a in RULES.get(name, ()) if mesh.shape[a] > 1 and a not in used
    ]
    while mesh_axes and size % math.prod(mesh.shape[a] for a in mesh_axes):
      mesh_axes.pop()
    used.update(mesh_axes)
    entries.append(tuple(mesh_axes) or None)
  return PartitionSpec(*entries)


def parameter_shardings(state, mesh: Mesh):
  """Returns a NamedSharding for each variable of an nnx state.

  Args:
    state: nnx.State, concrete or abstract, whose variables carry `axes`
      metadata; a variable without it is replicated.
    mesh: the mesh to lay it on.
  """

  def sharding_of(variable):
    axes = variable.get_metadata().get("axes", ())
    shape = variable.get_value().shape
    return NamedSharding(mesh, partition_spec(shape, axes, mesh))

  return jax.tree.map(
    sharding_of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )


def placed(state, mesh: Mesh | None):
  """Gives an abstract nnx state its shardings, for a restore or a jit.

  Args:
    state: nnx.State of shapes, or of arrays.
    mesh: where it will lie; None is the first device.

  Returns:
    The state with a jax.ShapeDtypeStruct in each variable.
  """
  flat = nnx.to_flat_state(state)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    layouts = {path: device for path, _ in flat}
  else:
    layouts = dict(nnx.to_flat_state(parameter_shardings(state, mesh)))
  return nnx.from_flat_state(
    (
      path,
      variable.replace(
        jax.ShapeDtypeStruct(
          variable.get_value().shape,
          variable.get_value().dtype,
          sharding=layouts[path],
        )
      ),
    )
    for path, variable in flat
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def page_sharding(mesh: Mesh, shape) -> NamedSharding:
  """The sharding of an array whose first axis counts the pages of a cache."""
  axes = ("pages",) + (None,) * (len(shape) - 1)
  return NamedSharding(mesh, partition_spec(shape, axes, mesh))


def on_mesh() -> bool:
  """Whether what is traced now is for the devices of a mesh."""
  return _active_mesh() is not None


def batch_sharding(mesh: Mesh, shape) -> NamedSharding:
  """The sharding of a [B, T] array of tokens."""
  return NamedSharding(mesh, partition_spec(shape, ("batch", "length"), mesh))


def _active_mesh():
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
    return None
  return mesh


def batch_shards(mesh: Mesh) -> int:
  """Parts that the rows of a batch divide into."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def num_shards(axis: str, *, besides: str | None = None) -> int:
  """Returns how many devices of the mesh in use split a logical axis.

  Args:
    axis: logical axis.
    besides: another one of the same array, which its mesh axes go to first.
  """
  mesh = _active_mesh()
  if mesh is None:
    return 1
  taken = RULES.get(besides, ())
  return math.prod(mesh.shape[a] for a in RULES.get(axis, ()) if a not in taken)


def constrain(x, *axes):
  """Constrains x to its logical axes; without a mesh returns x."""
  mesh = _active_mesh()
  if mesh is None:
    return x
  spec = partition_spec(x.shape, axes, mesh)
  return jax.lax.with_sharding_constraint(x, spec)


class Gathered(NamedTuple):
  """How `shard_call` takes a weight: as it is stored, gathered on the device.

  The gradient then goes back by a reduce-scatter. A weight that is merely
  asked for whole is reduced in full on every device first.

  Attributes:
    stored: logical axes by which it lies.
    wanted: logical axes by which the function takes it; the others' mesh axes
      are gathered.
    dtype: type in which it travels, rounded to it; None keeps its own. The
      gradient travels in the weight's type.
    tiled: whether the gradient is scattered as it lies, or with its parts as an
      axis of their own. A TPU's compiler makes a sum on every device of some
      scatters, of small parts in the first form and of large stacks of
      matrices in the second: `ahead.hlo` tells.
  """

  stored: tuple[str | None, ...]
  wanted: tuple[str | None, ...]
  dtype: Any = None
  tiled: bool = False


def gathered(axes, **how) -> Gathered:
  """Takes a weight stored by logical axes whole along those of GATHERED."""
  wanted = tuple(None if axis in GATHERED else axis for axis in axes)
  return Gathered(axes, wanted, **how)


def shard_call(function, args, in_axes, out_axes):
  """Calls function(*args) on each device's share.

  Args:
    function: takes arrays (or None) and returns a tuple of arrays whose
      shapes, whole, are those it would return without a mesh.
    args: a tuple of arrays; a None passes through.
    in_axes: for each argument a tuple of logical axes, one a dimension, or a
      `Gathered`. Where an argument is whole along a split axis, it is gathered
      first.
    out_axes: for each result likewise.
  """
  mesh = _active_mesh()
  if mesh is None:
    return function(*args)
  present = [i for i, arg in enumerate(args) if arg is not None]

  def on_present(*given):
    full = [None] * len(args)
    for i, value in zip(present, given):
      full[i] = value
    return function(*full)

  def on_shares(*shares):
    return on_present(
      *(
        _whole(share, args[i].shape, in_axes[i], mesh)
        for i, share in zip(present, shares)
      )
    )

  given = [args[i] for i in present]
  whole = jax.eval_shape(on_present, *given)
  in_specs = tuple(
    partition_spec(args[i].shape, _stored(in_axes[i]), mesh) for i in present
  )
  out_specs = tuple(
    partition_spec(result.shape, axes, mesh)
    for result, axes in zip(whole, out_axes)
  )
  return jax.shard_map(
    on_shares, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )(*given)


def _stored(axes):
  return axes.stored if isinstance(axes, Gathered) else axes


def _whole(share, shape, axes, mesh):
  """Gathers a device's share of a weight along what is not wanted split."""
  if not isinstance(axes, Gathered):
    return share
  stored = partition_spec(shape, axes.stored, mesh)
  wanted = partition_spec(shape, axes.wanted, mesh)
  hops = []
  for dimension, (has, wants) in enumerate(zip(stored, wanted)):
    split = tuple(a for a in _mesh_axes(has) if a not in _mesh_axes(wants))
    if math.prod(mesh.shape[axis] for axis in split) == mesh.size:
      # A gather over all devices at once becomes an all-reduce on TPU: the
      # minor axis first, one at a time.
      hops += [(dimension, (axis,)) for axis in reversed(split)]
    elif split:
      hops.append((dimension, split))
  if not hops:
    return share
  return _gather(share, tuple(hops), axes.dtype, axes.tiled)


def _mesh_axes(entry) -> tuple[str, ...]:
  """The mesh axes of a dimension's entry in a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else entry or ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(share, hops, dtype, tiled):
  del tiled
  whole = share if dtype is None else share.astype(dtype)
  for dimension, split in hops:
    whole = jax.lax.all_gather(whole, split, axis=dimension, tiled=True)
  return whole.astype(share.dtype)


def _gather_forward(share, hops, dtype, tiled):
  return _gather(share, hops, dtype, tiled), None


def _gather_backward(hops, dtype, tiled, _, gradient):
  del dtype
  for dimension, split in reversed(hops):
    if not tiled:
      shape, parts = gradient.shape, jax.lax.axis_size(split)
      gradient = gradient.reshape(
        *shape[:dimension], parts, -1, *shape[dimension + 1 :]
      )
    gradient = jax.lax.psum_scatter(
      gradient, split, scatter_dimension=dimension, tiled=tiled
    )
  # A TPU's compiler stops with an internal error where it tries to move such a
  # sum out of the loop over microbatches.
  return (jax.lax.optimization_barrier(gradient),)


_gather.defvjp(_gather_forward, _gather_backward)


def axes_of(name: str, size: int) -> tuple[str, ...]:
  """The mesh axes that split a dimension; none without a mesh."""
  mesh = _active_mesh()
  if mesh is None:
    return ()
  return _mesh_axes(partition_spec((size,), (name,), mesh)[0])


def mesh_index(*axes):
  """Counts a device's share along mesh axes inside shard_call, major first.

  Without a mesh, or without an axis, it is 0.
  """
  if _active_or_manual() is None or not axes:
    return 0
  return jax.lax.axis_index(axes)


def mesh_sum(x, *axes):
  """Sums x over mesh axes inside shard_call; without a mesh returns x."""
  if _active_or_manual() is None:
    return x
  return jax.lax.psum(x, axes)


def _active_or_manual():
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.manual_axes:
    return None
  return mesh
