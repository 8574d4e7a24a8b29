"""What each stage trains, and what it leaves alone."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.training import run
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib
from tests.support import models
from tests.support import stage_steps
from tests.support import tolerances

RTOL, _ = tolerances.TOLERANCE["float32"]
# A dense and a MoE layer: every test compiles steps of its own.
MODEL = dict(num_layers=2, num_mtp_layers=0)


@pytest.fixture(scope="module")
def batch():
  return stage_steps.packed_batch()


def changed_paths(stage, batch):
  """Returns the paths that two steps change, and those they do not."""
  before = stage_steps.flat(nnx.state(models.tiny_model(**MODEL)))
  _, state = stage_steps.one_step(stage, batch, steps=2, **MODEL)
  after = stage_steps.flat(state)
  changed = {p for p in before if (before[p] != after[p]).any()}
  return changed, set(before) - changed


def test_warmup_moves_the_indexer_alone(batch):
  changed, kept = changed_paths(stages.DENSE_WARMUP, batch)
  assert changed == {p for p in changed | kept if "indexer" in p}
  assert len(changed) == 2 * 5


def test_warmup_keeps_moments_of_the_indexer_alone():
  optimizer = stage_steps.make_optimizer()
  _, state = step_lib.init_state(
    models.tiny_model(**MODEL), stages.DENSE_WARMUP, optimizer
  )
  for moments in (state.optimizer.adam.mu, state.optimizer.adam.nu):
    paths = [path for path, _ in nnx.to_flat_state(moments)]
    assert len(paths) == 2 * 5 and all("indexer" in path for path in paths)


def test_warmup_attention_is_dense_whatever_the_indexer(batch):
  options = stages.DENSE_WARMUP.options(models.tiny_config(**MODEL))
  plain = attention.AttentionOptions(select=selection.DENSE)
  model, other = models.tiny_model(**MODEL), models.tiny_model(**MODEL)
  for stack in (other.dense_layers, other.moe_layers):
    query = stack.attention.indexer.query
    query[...] = -5 * query[...]
  want = model(batch.tokens_BT, options=plain).logits
  for one in (model, other):
    output = one(batch.tokens_BT, options=options, record=True)
    assert (output.logits == want).all()
    assert output.gather("selection") is None


def test_pretraining_leaves_the_indexer(batch):
  changed, kept = changed_paths(stages.PRETRAIN, batch)
  assert kept == {p for p in changed | kept if "indexer" in p}


def test_sparse_stage_moves_everything(batch):
  assert not changed_paths(stage_steps.STAGES["sparse"], batch)[1]


def gradients(stage, batch):
  """Gradients of a stage's loss with respect to every parameter."""
  model = models.tiny_model(**MODEL)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  per = step_lib.denominators(batch, 1)

  def loss(params):
    model = nnx.merge(graph, params, rest)
    return step_lib.stage_loss(model, batch, stage, per)[0]

  return stage_steps.flat(jax.grad(loss)(params))


def test_model_losses_do_not_reach_the_indexer(batch):
  stage = dataclasses.replace(stages.SPARSE, indexer_weight=0.0)
  for path, gradient in gradients(stage, batch).items():
    assert bool(gradient.any()) == ("indexer" not in path), path


def test_indexer_loss_does_not_leave_the_indexer(batch):
  stage = dataclasses.replace(
    stages.SPARSE, lm_weight=0.0, mtp_weight=0.0, balance_weight=0.0
  )
  for path, gradient in gradients(stage, batch).items():
    assert bool(gradient.any()) == ("indexer" in path), path


@pytest.mark.parametrize("name", stage_steps.STAGES)
def test_microbatches_add_up_to_the_batch(batch, name):
  stage = stage_steps.STAGES[name]
  whole, _ = stage_steps.one_step(stage, batch, **MODEL)
  parts, _ = stage_steps.one_step(stage, batch, microbatches=4, **MODEL)
  for key in ("loss", "gradient_norm"):
    np.testing.assert_allclose(parts[key], whole[key], rtol=RTOL)


@pytest.mark.parametrize("remat", ["layer", "save_selection", "save_attention"])
def test_rematerialisation_changes_nothing(batch, remat):
  stage = stage_steps.STAGES["sparse"]
  want, _ = stage_steps.one_step(stage, batch, **MODEL)
  got, _ = stage_steps.one_step(stage, batch, remat=run.REMAT[remat], **MODEL)
  for key in want:
    np.testing.assert_allclose(got[key], want[key], rtol=RTOL, err_msg=key)


def test_a_step_with_a_nan_changes_nothing(batch):
  stage = stage_steps.STAGES["sparse"]
  broken = dataclasses.replace(
    batch, loss_mask_BT=batch.loss_mask_BT * np.float32(np.nan)
  )
  before = stage_steps.flat(nnx.state(models.tiny_model(**MODEL)))
  metrics, state = stage_steps.one_step(stage, broken, steps=3, **MODEL)
  assert int(metrics["skipped_steps"]) == 3
  for path, value in stage_steps.flat(state).items():
    np.testing.assert_array_equal(value, before[path], err_msg=str(path))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(select="top_k"), "warm-up is dense"),
    (dict(indexer_weight=0.0), "needs indexer_weight"),
    (dict(lm_weight=1.0), "with lm_weight"),
  ],
)
def test_a_warmup_that_is_none_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(stages.DENSE_WARMUP, **changes)


def test_controls_have_no_indexer_loss():
  with pytest.raises(ValueError, match="no part in it"):
    dataclasses.replace(stages.SPARSE, select="window")


@pytest.mark.parametrize("mtp_ran", [True, False])
def test_the_bias_of_a_module_that_did_not_run_stays(mtp_ran):
  state = nnx.State(
    {
      "moe_layers": {"bias": nnx.Param(jnp.zeros((2, 4)))},
      "mtp": {"bias": nnx.Param(jnp.zeros(4))},
    }
  )
  load_LE = jnp.array([[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]])
  moved = step_lib._move_bias(state, load_LE[: 2 + mtp_ran], 1.0)
  wanted = np.sign(1.0 - np.asarray(load_LE))
  np.testing.assert_array_equal(moved["moe_layers"]["bias"][...], wanted[:2])
  np.testing.assert_array_equal(moved["mtp"]["bias"][...], wanted[2] * mtp_ran)
