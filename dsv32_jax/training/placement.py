"""Where a stage's state lies on the mesh: as arrays, or only described."""

from flax import nnx
import jax

from dsv32_jax import sharding
from dsv32_jax.training import step as step_lib


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
