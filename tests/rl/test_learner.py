"""The GRPO step: replay of what the sampler did, losses, update."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.model import token_order
from dsv32_jax.rl import config as rl_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import learner
from dsv32_jax.rl import replay
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib
from tests.support import models
from tests.support import rollouts
from tests.support import stage_steps
from tests.support import tolerances

# B batch, T tokens, E experts, L layers, V vocabulary

MODEL = dict(num_layers=2, num_mtp_layers=0)
GRPO = grpo.GrpoConfig(
  clip_low=0.2, clip_high=0.2, kl_weight=0.05, off_policy_threshold=None
)
CONFIG = rl_config.LearnerConfig(grpo=GRPO)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(**MODEL)


@pytest.fixture(scope="module")
def batch(model):
  return rollouts.pack(rollouts.rollout(model), model.config, rows=5)


@pytest.fixture(scope="module")
def truncated(model):
  trajectories = rollouts.rollout(model, top_p=0.6, temperature=0.8, seed=1)
  return rollouts.pack(trajectories, model.config)


def logp_of(model, batch, config, *, routing=True):
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    return learner.policy_forward(
      nnx.merge(graph, state), batch, config, routing=routing
    )[1]

  return np.asarray(run(state, batch))


def log_ratio(model, batch, config, **kwargs):
  """Largest |log ratio| over the written tokens."""
  gap_BT = logp_of(model, batch, config, **kwargs) - batch.old_logp_BT
  return np.max(np.abs(gap_BT * batch.batch.loss_mask_BT))


def perturbed(model, *, bias=0.0, router=0.0, indexer=0.0):
  """A copy of the model whose router and indexer have moved."""
  copy = nnx.clone(model)
  generator = np.random.default_rng(5)
  ffn = copy.moe_layers.ffn
  for variable, scale in ((ffn.expert_bias, bias), (ffn.router, router)):
    noise = scale * generator.normal(size=variable[...].shape)
    variable[...] += jnp.asarray(noise, jnp.float32)
  noise = jax.tree.map(
    lambda x: (
      x + indexer * jnp.asarray(generator.normal(size=x.shape), x.dtype)
    ),
    nnx.state(copy, stages.in_indexer),
  )
  nnx.update(copy, noise)
  return copy


def test_an_on_policy_ratio_is_one(model, batch):
  assert log_ratio(model, batch, CONFIG) < 1e-5


def test_keep_routing_undoes_a_moved_bias(model, batch):
  # The bias alone decides who is chosen, not how much each counts.
  moved = perturbed(model, bias=0.5)
  assert log_ratio(moved, batch, CONFIG) < 1e-5
  assert log_ratio(moved, batch, CONFIG, routing=False) > 1e-2


def test_a_replayed_selection_undoes_a_moved_indexer(model, batch):
  moved = perturbed(model, indexer=1.0)
  replayed = dataclasses.replace(CONFIG, replay_selection=True)
  assert log_ratio(moved, batch, replayed) < 1e-5
  assert log_ratio(moved, batch, CONFIG) > 1e-2


def test_keep_routing_trains_the_sampled_experts_only(model):
  # One written token, in a model whose only MoE layer is its last: no other
  # token's experts reach its log-probability.
  (one,) = rollouts.rollout(model, rows=1, length=rollouts.PROMPT + 1)
  batch = rollouts.pack([one], model.config, advantages=[1.0])
  moved = perturbed(model, router=1.0)
  graph, trained, *others = stages.partition(moved, "model")

  def trained_experts(keep_routing):
    config = dataclasses.replace(
      CONFIG, keep_routing=keep_routing, stage=rl_config.INDEXER_FROZEN
    )

    def loss(trained):
      return learner.rl_loss(nnx.merge(graph, trained, *others), batch, config)[
        0
      ]

    gradient = jax.jit(jax.grad(loss))(trained)
    up_EDF = gradient["moe_layers"]["ffn"]["up"].get_value()[0]
    return set(np.flatnonzero(np.abs(up_EDF).max((1, 2)) > 0).tolist())

  sampled = set(one.parts[0].experts_LNA[0, -1].tolist())
  assert trained_experts(True) == sampled
  assert trained_experts(False) != sampled


def test_keep_sampling_mask_makes_the_ratio_one(model, truncated):
  config = dataclasses.replace(CONFIG, temperature=0.8)
  assert truncated.kept.bits_BTW is not None
  assert log_ratio(model, truncated, config) < 1e-5
  without = dataclasses.replace(config, keep_sampling_mask=False)
  # Renormalised over at least 0.6 and less than all of the probability.
  assert 0.1 < log_ratio(model, truncated, without) <= -np.log(0.6)
  assert log_ratio(model, truncated, CONFIG) > 0.1


def test_the_reference_is_masked_and_routes_by_itself(model, truncated):
  config = dataclasses.replace(CONFIG, temperature=0.8)
  graph, state = step_lib.init_state(
    model, config.stage, stage_steps.make_optimizer()
  )
  moved = perturbed(model, bias=0.5)
  _, other = step_lib.init_state(
    moved, config.stage, stage_steps.make_optimizer()
  )
  fill = learner.make_reference_scorer(graph, config)
  got = fill(state, learner.snapshot(other), truncated).ref_logp_BT
  want = logp_of(moved, truncated, config, routing=False)
  tolerances.assert_close(got, want, "float32")
  replayed = dataclasses.replace(config, reference_replays_routing=True)
  fill = learner.make_reference_scorer(graph, replayed)
  got = fill(state, learner.snapshot(other), truncated).ref_logp_BT
  want = logp_of(moved, truncated, config, routing=True)
  tolerances.assert_close(got, want, "float32")


def take_steps(model, batch, config, steps=1, peak=1e-2, **kwargs):
  optimizer = stage_steps.make_optimizer(peak=peak, weight_decay=0.0)
  graph, state = step_lib.init_state(model, config.stage, optimizer)
  # The step gives its state up, and the model is the other tests' as well.
  state = jax.tree.map(jnp.copy, state)
  reference = learner.snapshot(state)
  before = jax.device_get(reference)
  batch = learner.make_reference_scorer(graph, config)(state, reference, batch)
  step = learner.make_learner_step(graph, config, optimizer, **kwargs)
  for _ in range(steps):
    state, metrics = step(state, batch)
  return graph, before, state, jax.device_get(metrics)


def test_a_step_moves_probability_towards_the_advantage(model, batch):
  graph, before, state, metrics = take_steps(model, batch, CONFIG)
  after = logp_of(step_lib.merge_model(graph, state), batch, CONFIG)
  written = batch.batch.loss_mask_BT
  gain_B = np.sum((after - batch.old_logp_BT) * written, axis=1)
  assert np.all(gain_B[:4] * batch.advantages_B[:4] > 0), gain_B
  # On policy and at the reference: ratio 1, no KL, advantages that cancel.
  np.testing.assert_allclose(metrics["ratio"], 1, rtol=1e-5)
  np.testing.assert_allclose(metrics["kl"], 0, atol=1e-9)
  np.testing.assert_allclose(metrics["policy_loss"], 0, atol=1e-5)
  assert metrics["gradient_norm"] > 0 and metrics["indexer_kl"] > 0
  for path, old in nnx.to_flat_state(before.router_bias):
    new = dict(nnx.to_flat_state(state.router_bias))[path]
    np.testing.assert_array_equal(new.get_value(), old.get_value())


def test_a_frozen_indexer_stays(model, batch):
  config = dataclasses.replace(CONFIG, stage=rl_config.INDEXER_FROZEN)
  graph, _, state, metrics = take_steps(model, batch, config)
  new, old = (
    dict(nnx.to_flat_state(nnx.state(m)))
    for m in (step_lib.merge_model(graph, state), model)
  )
  indexers = [path for path in new if "indexer" in path]
  assert indexers and "indexer_kl" not in metrics
  for path in indexers:
    np.testing.assert_array_equal(new[path].get_value(), old[path].get_value())
  kernel = ("head", "kernel")
  assert np.any(new[kernel].get_value() != old[kernel].get_value())


@pytest.mark.slow
def test_mtp_and_router_bias_are_choices(model):
  with_mtp = models.tiny_model(num_layers=2, num_mtp_layers=1)
  batch = rollouts.pack(
    rollouts.rollout(with_mtp, rows=2, length=8), with_mtp.config
  )
  speed = 1e-3
  stage = dataclasses.replace(
    rl_config.JOINT,
    mtp_weight=0.1,
    balance_weight=1e-4,
    router_bias_speed=speed,
  )
  config = dataclasses.replace(CONFIG, stage=stage)
  _, before, state, metrics = take_steps(with_mtp, batch, config)
  assert metrics["mtp_loss"] > 0 and metrics["balance_loss"] > 0
  old = dict(nnx.to_flat_state(before.router_bias))
  load_E = np.bincount(
    batch.experts_LBTA[0][batch.batch.segments_BT > 0].ravel(), minlength=8
  )
  for path, variable in nnx.to_flat_state(state.router_bias):
    change = np.asarray(variable.get_value()) - old[path].get_value()
    if "mtp" in path:
      assert np.any(change != 0)
    else:
      want = speed * np.sign(load_E.mean() - load_E)
      np.testing.assert_allclose(change[0], want, atol=1e-7)


@pytest.mark.slow
def test_the_router_bias_of_an_idle_mtp_stays():
  with_mtp = models.tiny_model(num_layers=2, num_mtp_layers=1)
  batch = rollouts.pack(
    rollouts.rollout(with_mtp, rows=2, length=8), with_mtp.config
  )
  stage = dataclasses.replace(rl_config.INDEXER_FROZEN, router_bias_speed=1e-3)
  config = dataclasses.replace(CONFIG, stage=stage)
  _, before, state, _ = take_steps(with_mtp, batch, config)
  old = dict(nnx.to_flat_state(before.router_bias))
  for path, variable in nnx.to_flat_state(state.router_bias):
    change = np.asarray(variable.get_value()) - old[path].get_value()
    assert np.any(change != 0) == ("mtp" not in path)


def test_padding_rows_change_nothing(model, batch):
  trajectories = rollouts.rollout(model)
  fewer = rollouts.pack(trajectories, model.config)
  graph, state = nnx.split(model)

  @jax.jit
  def loss(state, batch):
    return learner.rl_loss(nnx.merge(graph, state), batch, CONFIG)[0]

  assert fewer.batch.tokens_BT.shape[0] == batch.batch.tokens_BT.shape[0] - 1
  np.testing.assert_allclose(loss(state, batch), loss(state, fewer), rtol=1e-5)


def test_the_reference_is_refreshed_every_so_many_steps(model):
  optimizer = stage_steps.make_optimizer()
  _, state = step_lib.init_state(model, CONFIG.stage, optimizer)
  old = learner.snapshot(state)
  config = dataclasses.replace(CONFIG, reference_every=3)
  for step in range(7):
    now = state._replace(step=np.int32(step))
    new = learner.refresh_reference(config, now, old)
    assert (new is not old) == (step in (3, 6))
    assert learner.refresh_reference(CONFIG, now, old) is old


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(temperature=0.0), "temperature=0.0"),
    (dict(stage=stages.DENSE_WARMUP), "does not train the policy"),
    (dict(domain_kl_weights=(("math", -1.0),)), "math=-1.0"),
    (dict(minibatches=0), "minibatches=0"),
    (dict(reference_every=0), "reference_every=0"),
  ],
)
def test_bad_config(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_kl_weight_of_a_domain():
  config = dataclasses.replace(CONFIG, domain_kl_weights=(("math", 0.0),))
  assert config.kl_weight("math") == 0.0
  assert config.kl_weight("chat") == GRPO.kl_weight


@pytest.mark.slow
@pytest.mark.parametrize(
  "axes, microbatches, queries, replays_selection, mtp",
  [
    (dict(data=2, expert=2, context=2), 1, 2, True, 1),
    (dict(fsdp=2, context=2, tensor=2), 2, 4, False, 0),
  ],
)
def test_a_step_on_eight_devices_equals_one(
  axes, microbatches, queries, replays_selection, mtp
):
  model = models.tiny_model(num_layers=2, num_mtp_layers=mtp)
  trajectories = rollouts.rollout(model, rows=8, length=17, top_p=0.7)
  batch = rollouts.pack(trajectories, model.config)
  moved = perturbed(model, bias=0.5, router=0.1, indexer=1.0)
  stage = dataclasses.replace(
    rl_config.JOINT,
    mtp_weight=0.1 * mtp,
    balance_weight=1e-2,
    router_bias_speed=1e-3,
  )
  config = dataclasses.replace(
    CONFIG, stage=stage, replay_selection=replays_selection
  )
  _, _, want_state, want = take_steps(moved, batch, config, peak=1e-3)
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes), jax.devices()[:8])
  with jax.set_mesh(mesh):
    graph, state = nnx.split(moved)
    layout = jax.tree.map(lambda x: x.sharding, sharding.placed(state, mesh))
    sharded = nnx.merge(graph, jax.device_put(state, layout))
    placed = replay.place(batch, mesh)
    assert placed.order == token_order.TokenOrder(queries)
    experts = placed.experts_LBTA
    assert experts.addressable_shards[0].data.size < experts.size
    _, _, got_state, got = take_steps(
      sharded,
      placed,
      config,
      peak=1e-3,
      microbatches=microbatches,
      remat=jax.checkpoint,
    )
  relative, absolute = tolerances.TOLERANCE["float32"]
  assert set(got) == set(want) and want["loss"] != 0
  for name in want:
    np.testing.assert_allclose(
      got[name], want[name], relative, absolute, err_msg=name
    )
  for one, other in zip(
    jax.tree.leaves(got_state.router_bias),
    jax.tree.leaves(want_state.router_bias),
  ):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
