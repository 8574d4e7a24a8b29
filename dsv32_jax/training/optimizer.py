"""AdamW as DeepSeek trains with it, and a guard against bad gradients.

Both Adam moments may be kept in bfloat16 (DeepSeek-V3 report, section 3.3.2);
the arithmetic is float32 whatever the parameters and moments are kept in. A
step whose gradient holds a NaN or an infinity changes nothing and is counted.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dsv32_jax.training import schedule as schedules

MOMENT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with clipping; the defaults are DeepSeek-V3's (section 4.2).

  Attributes:
    schedule: learning rate over steps.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: per step and unit of learning rate, on matrices only.
    clip_norm: largest global gradient norm; None: no clipping.
    moment_dtype: float32 or bfloat16, for both moments.
    max_consecutive_skips: skipped steps in a row at which a run stops.
  """

  schedule: schedules.ScheduleConfig
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  moment_dtype: str = "float32"
  max_consecutive_skips: int = 10

  def __post_init__(self):
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f"optimizer.{name}={getattr(self, name)} must be in [0, 1)"
        )
    if self.epsilon <= 0:
      raise ValueError(f"optimizer.epsilon={self.epsilon} must be positive")
    if self.weight_decay < 0:
      raise ValueError(
        f"optimizer.weight_decay={self.weight_decay} must not be negative"
      )
    if self.clip_norm is not None and self.clip_norm <= 0:
      raise ValueError(
        f"optimizer.clip_norm={self.clip_norm} must be positive or None"
      )
    if self.moment_dtype not in MOMENT_DTYPES:
      raise ValueError(
        f"optimizer.moment_dtype={self.moment_dtype!r} must be one of "
        f"{', '.join(MOMENT_DTYPES)}"
      )
    if self.max_consecutive_skips < 1:
      raise ValueError(
        f"optimizer.max_consecutive_skips={self.max_consecutive_skips} must be"
        " positive"
      )


class AdamState(NamedTuple):
  """Moments of the applied steps: count int32, mu and nu like the params."""

  count: jax.Array
  mu: Any
  nu: Any


class OptimizerState(NamedTuple):
  """State of `make_optimizer`.

  Attributes:
    adam: state of the applied steps.
    skipped: int32, steps skipped since the start.
    consecutive_skips: int32, steps skipped since the last applied one.
  """

  adam: AdamState
  skipped: jax.Array
  consecutive_skips: jax.Array


def global_norm(tree) -> jax.Array:
  """Root of the sum of squares of all entries, summed in float32."""
  squares = [
    jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    for leaf in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, jnp.float32(0.0)))


def is_matrix(params):
  """Tells which parameters weight decay shrinks: not norm scales and biases.

  Args:
    params: pytree. An nnx.Variable with `axes` counts those (a leading layer
      axis has no name there); any other array counts its own axes.

  Returns:
    The tree with each Variable or array replaced by a bool.
  """

  def count(leaf):
    if isinstance(leaf, nnx.Variable):
      axes = leaf.get_metadata().get("axes")
      return len(axes) if axes is not None else leaf.get_value().ndim
    return leaf.ndim

  return jax.tree.map(
    lambda leaf: count(leaf) >= 2, params, is_leaf=_is_variable
  )


# One object for one config: what is compiled with it is found again.
@functools.lru_cache(maxsize=32)
def make_optimizer(
  config: OptimizerConfig, decays=is_matrix
) -> optax.GradientTransformation:
  """Builds clipping, AdamW, learning rate and guard as one transformation.

  `update(grads, state, params)` returns float32 updates to add to the params
  (`optax.apply_updates` adds in float32 and rounds to the params' dtype) and an
  `OptimizerState`. If the global norm of `grads` is not finite, the updates
  leave every bit of the params as it is and only the counters move; nothing is
  sent to the host, so the caller reads them when it likes.

  Args:
    config: numbers of the optimiser.
    decays: function from params to a prefix tree of bools: what decays.
  """
  learning_rate = schedules.make_schedule(config.schedule)

  def init(params):
    dtype = MOMENT_DTYPES[config.moment_dtype]

    def zeros(leaf):
      return jnp.zeros_like(leaf, dtype=dtype)

    return OptimizerState(
      adam=AdamState(
        count=jnp.zeros((), jnp.int32),
        mu=jax.tree.map(zeros, params),
        nu=jax.tree.map(zeros, params),
      ),
      skipped=jnp.zeros((), jnp.int32),
      consecutive_skips=jnp.zeros((), jnp.int32),
    )

  def update(grads, state, params):
    norm = global_norm(grads)
    finite = jnp.isfinite(norm)
    if config.clip_norm is not None:
      factor = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
    else:
      factor = jnp.float32(1.0)
    updates, adam = _adamw(
      config,
      jax.tree.map(lambda g: g.astype(jnp.float32) * factor, grads),
      state.adam,
      params,
      learning_rate(state.adam.count),
      _broadcast(decays(params), params),
    )
    # Adding -0.0 keeps every float as it is; adding 0.0 would turn -0.0 over.
    updates = jax.tree.map(lambda u: jnp.where(finite, u, -0.0), updates)
    adam = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), adam, state.adam
    )
    skip = jnp.logical_not(finite).astype(jnp.int32)
    return updates, OptimizerState(
      adam=adam,
      skipped=state.skipped + skip,
      consecutive_skips=(state.consecutive_skips + skip) * skip,
    )

  return optax.GradientTransformation(init, update)


def must_stop(config: OptimizerConfig, state: OptimizerState) -> bool:
  """Tells, on the host, if too many steps in a row were skipped."""
  return int(state.consecutive_skips) >= config.max_consecutive_skips


def _is_variable(leaf) -> bool:
  return isinstance(leaf, nnx.Variable)


def _broadcast(flags, params):
  """Repeats each flag over the arrays of the params below it."""
  return jax.tree.map(
    lambda flag, below: jax.tree.map(lambda _: flag, below), flags, params
  )


def _adamw(config, grads, state, params, rate, decays):
  """One AdamW step (Loshchilov and Hutter 2019, algorithm 2), in float32."""
  count = state.count + 1
  correction_1 = 1.0 - jnp.float32(config.b1) ** count
  correction_2 = 1.0 - jnp.float32(config.b2) ** count

  def first(g, m):
    return config.b1 * m.astype(jnp.float32) + (1.0 - config.b1) * g

  def second(g, v):
    return config.b2 * v.astype(jnp.float32) + (1.0 - config.b2) * g * g

  def change(m, v, p, decay):
    direction = (m / correction_1) / (
      jnp.sqrt(v / correction_2) + config.epsilon
    )
    if decay:
      direction += config.weight_decay * p.astype(jnp.float32)
    return -rate * direction

  mu = jax.tree.map(first, grads, state.mu)
  nu = jax.tree.map(second, grads, state.nu)
  updates = jax.tree.map(change, mu, nu, params, decays)

  def kept(new, old):
    # After the step, which used the moments before this rounding.
    return new.astype(old.dtype)

  return updates, AdamState(
    count=count,
    mu=jax.tree.map(kept, mu, state.mu),
    nu=jax.tree.map(kept, nu, state.nu),
  )
