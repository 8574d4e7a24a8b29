"""AdamW against a float64 oracle and optax; the guard against bad gradients."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from tests.support import tolerances

SHAPES = {"matrix": (5, 3), "scale": (7,), "nested": {"kernel": (2, 3, 4)}}
DECAYS = {"matrix": True, "scale": False, "nested": {"kernel": True}}


def make_tree(seed: int, scale: float = 1.0, dtype=jnp.float32):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(generator.normal(size=shape) * scale, dtype),
    SHAPES,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def make_config(**changes) -> optimizer.OptimizerConfig:
  rates = schedule.ScheduleConfig(
    peak=3e-2, warmup_steps=4, decay_steps=10, final=1e-3
  )
  return optimizer.OptimizerConfig(schedule=rates, **changes)


@functools.lru_cache
def make_step(config):
  transformation = optimizer.make_optimizer(config)

  @jax.jit
  def step(params, state, grads):
    updates, state = transformation.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(transformation.init), step


def run(config, params, gradients):
  init, step = make_step(config)
  state = init(params)
  for grads in gradients:
    params, state = step(params, state, grads)
  return params, state


def oracle_rate(config, step: int) -> float:
  """The schedule, in the words of its docstring."""
  if step < config.warmup_steps:
    return config.peak * (step + 1) / config.warmup_steps
  past = step - config.warmup_steps - config.hold_steps
  if config.decay_steps == 0 or past <= 0:
    return config.peak
  fraction = min(past / config.decay_steps, 1.0)
  span = config.peak - config.final
  return config.final + span * 0.5 * (1 + np.cos(np.pi * fraction))


def oracle_adamw(config, params, gradients):
  """Loshchilov and Hutter (2019), algorithm 2, after clipping; float64."""
  params = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
  decays = jax.tree.leaves(DECAYS)
  mu = [np.zeros_like(p) for p in params]
  nu = [np.zeros_like(p) for p in params]
  for step, tree in enumerate(gradients):
    grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(tree)]
    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
    if config.clip_norm is not None and norm > config.clip_norm:
      grads = [g * config.clip_norm / norm for g in grads]
    rate = oracle_rate(config.schedule, step)
    for i, g in enumerate(grads):
      mu[i] = config.b1 * mu[i] + (1 - config.b1) * g
      nu[i] = config.b2 * nu[i] + (1 - config.b2) * g**2
      m_hat = mu[i] / (1 - config.b1 ** (step + 1))
      n_hat = nu[i] / (1 - config.b2 ** (step + 1))
      change = m_hat / (np.sqrt(n_hat) + config.epsilon)
      if decays[i]:
        change += config.weight_decay * params[i]
      params[i] = params[i] - rate * change
  return params


def assert_same_bits(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("clip_norm", [None, 0.7, 100.0])
def test_matches_the_oracle(clip_norm):
  config = make_config(clip_norm=clip_norm)
  params = make_tree(0)
  gradients = [make_tree(step + 1) for step in range(20)]
  got, _ = run(config, params, gradients)
  want = oracle_adamw(config, params, gradients)
  for a, b in zip(jax.tree.leaves(got), want, strict=True):
    tolerances.assert_close(a, b, "float32")


def test_matches_optax():
  config = make_config(clip_norm=0.5)
  params = make_tree(0)
  gradients = [make_tree(step + 1) for step in range(12)]
  reference = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(
      schedule.make_schedule(config.schedule),
      b1=0.9,
      b2=0.95,
      weight_decay=0.1,
      mask=DECAYS,
    ),
  )
  want, state = params, reference.init(params)
  for grads in gradients:
    updates, state = reference.update(grads, state, want)
    want = optax.apply_updates(want, updates)
  got, _ = run(config, params, gradients)
  jax.tree.map(tolerances.assert_close, got, want)


def test_bfloat16_moments_keep_float32_arithmetic():
  config = make_config(moment_dtype="bfloat16", clip_norm=None)
  params = make_tree(0)
  grads = make_tree(1)
  _, state = run(config, params, [make_tree(2)])
  transformation = optimizer.make_optimizer(config)
  updates, after = transformation.update(grads, state, params)
  for name in ("mu", "nu"):
    for leaf in jax.tree.leaves(getattr(after.adam, name)):
      assert leaf.dtype == jnp.bfloat16
  # The same step from the same moments, held in float32 and not rounded.
  wide = make_config(clip_norm=None)
  moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.adam)
  exact = state._replace(adam=moments._replace(count=state.adam.count))
  want, _ = optimizer.make_optimizer(wide).update(grads, exact, params)
  assert_same_bits(updates, want)


def test_bfloat16_parameters_are_updated_in_float32():
  params = make_tree(0, dtype=jnp.bfloat16)
  transformation = optimizer.make_optimizer(make_config())
  updates, _ = transformation.update(
    make_tree(1, dtype=jnp.bfloat16), transformation.init(params), params
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {
    np.dtype("float32")
  }
  assert optax.apply_updates(params, updates)["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_a_bad_gradient_changes_no_bit(bad, moment_dtype):
  config = make_config(moment_dtype=moment_dtype)
  params = make_tree(0)
  params["scale"] = params["scale"].at[:2].set(jnp.array([-0.0, 0.0]))
  good = [make_tree(1), make_tree(2)]
  poison = make_tree(3)
  poison["matrix"] = poison["matrix"].at[2, 1].set(bad)
  _, before = run(config, params, good[:1])
  still, after = run(config, params, [poison])
  assert_same_bits(still, params)
  assert int(after.adam.count) == 0

  skipped, state = run(config, params, [good[0], poison, poison])
  assert_same_bits(state.adam, before.adam)
  assert (int(state.skipped), int(state.consecutive_skips)) == (2, 2)

  with_skips, state = run(config, params, [good[0], poison, poison, good[1]])
  without, clean = run(config, params, good)
  assert_same_bits(with_skips, without)
  assert_same_bits(state.adam, clean.adam)
  assert (int(state.skipped), int(state.consecutive_skips)) == (2, 0)
  assert int(clean.skipped) == 0
  assert not np.array_equal(skipped["matrix"], with_skips["matrix"])


def test_too_many_skips_in_a_row_stop_the_run():
  config = make_config(max_consecutive_skips=3)
  poison = make_tree(3, scale=np.nan)
  for number in (1, 2, 3, 4):
    _, state = run(config, make_tree(0), [poison] * number)
    assert optimizer.must_stop(config, state) == (number >= 3)


def test_global_norm_sums_in_float32():
  ones = jnp.ones((300, 300), jnp.bfloat16)
  assert float(optimizer.global_norm({"a": ones, "b": ones})) == pytest.approx(
    np.sqrt(180000.0), rel=1e-6
  )
  assert float(optimizer.global_norm({})) == 0.0


def test_what_decays_is_told_by_logical_axes():
  state = nnx.State(
    {
      "stacked": {
        "scale": nnx.Param(jnp.ones((4, 3)), axes=("embed",)),
        "kernel": nnx.Param(jnp.ones((4, 3, 2)), axes=("embed", "ffn")),
      },
      "plain": nnx.Param(jnp.ones(3)),
    }
  )
  assert jax.tree.leaves(optimizer.is_matrix(state)) == [False, True, False]
  transformation = optimizer.make_optimizer(make_config())
  updates, after = transformation.update(
    jax.tree.map(jnp.zeros_like, state), transformation.init(state), state
  )
  moved = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates)]
  assert moved == [False, True, False]
  kernel = after.adam.mu["stacked"]["kernel"]
  assert kernel.get_metadata()["axes"] == ("embed", "ffn")


def test_sharded_equals_single_device():
  params, gradients = make_tree(0), [make_tree(1), make_tree(2)]
  mesh = jax.make_mesh(
    (2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
  )
  split = jax.NamedSharding(mesh, jax.P("x"))

  def place(tree):
    kernel = jax.device_put(tree["nested"]["kernel"], split)
    return tree | {"nested": {"kernel": kernel}}

  want, _ = run(make_config(), params, gradients)
  got, _ = run(make_config(), place(params), [place(g) for g in gradients])
  jax.tree.map(tolerances.assert_close, got, want)


@pytest.mark.parametrize(
  "config",
  [
    schedule.ScheduleConfig(peak=1e-3),
    schedule.ScheduleConfig(peak=1e-3, warmup_steps=1),
    schedule.ScheduleConfig(peak=2.0, warmup_steps=7, hold_steps=5),
    schedule.ScheduleConfig(peak=2.0, decay_steps=9, final=0.5),
    schedule.ScheduleConfig(
      peak=2.0, warmup_steps=3, hold_steps=4, decay_steps=9, final=0.1
    ),
  ],
)
def test_schedule_matches_the_oracle(config):
  steps = np.arange(40)
  rates = jax.jit(jax.vmap(schedule.make_schedule(config)))(steps)
  want = np.array([oracle_rate(config, int(step)) for step in steps])
  assert rates.dtype == jnp.float32
  tolerances.assert_close(rates, want)


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({"b1": 1.0}, "b1"),
    ({"b2": -0.1}, "b2"),
    ({"epsilon": 0.0}, "epsilon"),
    ({"weight_decay": -1.0}, "weight_decay"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"moment_dtype": "float16"}, "moment_dtype"),
    ({"max_consecutive_skips": 0}, "max_consecutive_skips"),
  ],
)
def test_bad_configs_name_the_field(change, field):
  with pytest.raises(ValueError, match=rf"optimizer\.{field}="):
    make_config(**change)


@pytest.mark.parametrize(
  ("change", "field"),
  [
    ({"peak": 0.0}, "peak"),
    ({"peak": 1.0, "final": 2.0}, "final"),
    ({"peak": 1.0, "warmup_steps": -1}, "warmup_steps"),
    ({"peak": 1.0, "decay_steps": -1}, "decay_steps"),
  ],
)
def test_bad_schedules_name_the_field(change, field):
  with pytest.raises(ValueError, match=rf"schedule\.{field}="):
    schedule.ScheduleConfig(**change)
