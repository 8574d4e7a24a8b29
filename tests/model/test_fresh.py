"""Fresh weights: their distribution, and that the mesh does not matter."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.model import fresh
from tests.support import models
from tests.support import stage_steps


def fresh_state(seed=0, mesh=None, dtype=jnp.float32):
  model = fresh.fresh_model(
    models.tiny_config(), seed=seed, dtype=dtype, mesh=mesh
  )
  return stage_steps.flat(nnx.state(model))


@pytest.mark.parametrize(
  "axes", [dict(fsdp=8), dict(expert=4, tensor=2), dict(fsdp=2, expert=4)]
)
def test_weights_do_not_depend_on_the_mesh(axes):
  mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
  alone, spread = fresh_state(), fresh_state(mesh=mesh)
  for path, value in alone.items():
    np.testing.assert_array_equal(spread[path], value, err_msg=str(path))


def test_matrices_are_normal_and_independent():
  state = fresh_state()
  weights = [v for p, v in state.items() if v.ndim > 1 and np.ptp(v) > 0]
  values = np.concatenate([w.ravel() for w in weights]).astype(np.float64) / 0.2
  count = values.size
  assert abs(values.mean()) < 4 / count**0.5
  assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5
  gate = state["moe_layers", "ffn", "gate"].reshape(16, -1)
  correlation = np.corrcoef(gate) - np.eye(16)
  assert np.abs(correlation).max() < 5 / gate.shape[1] ** 0.5


def test_norms_begin_as_the_identity():
  state = fresh_state(dtype=jnp.bfloat16)
  for path, value in state.items():
    if path[-1] in ("scale", "bias", "expert_bias"):
      assert (value == (path[-1] == "scale")).all(), path
  assert state["embed", "table"].dtype == jnp.bfloat16
  bias = state["moe_layers", "attention", "indexer", "key_norm", "bias"]
  assert bias.dtype == np.float32


def test_seeds_differ():
  one, two = fresh_state(0), fresh_state(1)
  assert (one["head", "kernel"] != two["head", "kernel"]).all()
