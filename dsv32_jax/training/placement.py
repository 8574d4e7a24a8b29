"""Where a stage's state lies on the mesh: as arrays, or only described."""

from typing import NamedTuple

from flax import nnx
import jax

from dsv32_jax import sharding
from dsv32_jax.training import step as step_lib


class RowShare(NamedTuple):
  """Which rows of every batch a process has to read.

  Attributes:
    index: of the share.
    count: shares that a batch divides into, of as many rows each.
  """

  index: int
  count: int


def row_share(layout: jax.sharding.Sharding, shape, process: int) -> RowShare:
  """Finds the rows of a global batch that a process holds some tokens of.

  Processes among which a mesh cuts the rows themselves have the same share.
  Where processes hold rows that are not side by side, or not as many, all of
  them read everything.

  Args:
    layout: of the batch.
    shape: [B, T].
    process: its index.
  """
  held: dict[int, set[int]] = {}
  for device, index in layout.devices_indices_map(tuple(shape)).items():
    rows = range(*index[0].indices(shape[0]))
    held.setdefault(device.process_index, set()).update(rows)
  size = len(held[process])
  shares = {(min(rows) // size, len(rows)) for rows in held.values()}
  are_whole = all(
    rows == set(range(min(rows), min(rows) + size)) and min(rows) % size == 0
    for rows in held.values()
  )
  if not are_whole or len(shares) * size != shape[0]:
    return RowShare(0, 1)
  return RowShare(min(held[process]) // size, len(shares))


def first_state(model, stage, optimizer, mesh):
  """Makes the state at the beginning of a stage.

  Args:
    model: of arrays on the mesh.
    stage: StageConfig.
    optimizer: GradientTransformation.
    mesh: the mesh.

  Returns:
    (graph, TrainState of arrays).
  """
  graph, state = step_lib.init_state(model, stage, _Jitted(optimizer))
  return graph, state._replace(
    optimizer=place_optimizer(state.optimizer, state.trained, mesh),
    step=jax.device_put(state.step, sharding.replicated(mesh)),
  )


def abstract_state(model, stage, optimizer, mesh):
  """Describes that state; `model` is abstract and need not be placed.

  Returns:
    (graph, TrainState of jax.ShapeDtypeStruct with shardings on the mesh).
  """
  graph, variables = nnx.split(model)
  placed = nnx.merge(graph, sharding.placed(variables, mesh))
  graph, state = step_lib.init_state(placed, stage, _Described(optimizer))
  step = jax.ShapeDtypeStruct(
    state.step.shape, state.step.dtype, sharding=sharding.replicated(mesh)
  )
  return graph, state._replace(
    optimizer=place_optimizer(state.optimizer, state.trained, mesh), step=step
  )


def place_optimizer(optimizer_state, trained, mesh):
  """Lays moments out as their parameters, and counters everywhere.

  Args:
    optimizer_state: of arrays or of shapes.
    trained: nnx.State with the parameters' axes.
    mesh: the mesh.

  Returns:
    The state of arrays, or of shapes with shardings.
  """
  layout = sharding.placed(trained, mesh)

  def like(moments):
    return jax.tree.map(
      lambda x, parameter: _place(x, parameter.sharding), moments, layout
    )

  everywhere = sharding.replicated(mesh)
  adam = optimizer_state.adam
  return optimizer_state._replace(
    adam=adam._replace(
      count=_place(adam.count, everywhere),
      mu=like(adam.mu),
      nu=like(adam.nu),
    ),
    skipped=_place(optimizer_state.skipped, everywhere),
    consecutive_skips=_place(optimizer_state.consecutive_skips, everywhere),
  )


class _Jitted:
  """An optimiser whose first state is made in one compiled call."""

  def __init__(self, optimizer):
    self.init = jax.jit(optimizer.init)


class _Described:
  """An optimiser whose first state is only described."""

  def __init__(self, optimizer):
    self._init = optimizer.init

  def init(self, params):
    """Returns the shapes of the state."""
    return jax.eval_shape(self._init, params)


def _place(x, layout):
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
  return jax.device_put(x, layout)
