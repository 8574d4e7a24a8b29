"""What is chosen on eight devices is what is chosen on one, bit for bit."""

from flax import nnx
import jax
import numpy as np
import pytest

from dsv32_jax import sharding
from dsv32_jax.model import attention
from dsv32_jax.model import selection
from tests.support import models

MESHES = {
  "fsdp2_expert2_context2": dict(fsdp=2, expert=2, context=2),
  "context4_tensor2": dict(context=4, tensor=2),
}
ROWS, LENGTH, TOP_K = 8, 64, 6


def choices(mesh_config, form):
  """Returns the selections and experts of every layer, on a mesh or none."""
  sizes = sharding.MeshConfig(**mesh_config)
  count = int(np.prod(list(mesh_config.values()), initial=1))
  mesh = sharding.make_mesh(sizes, jax.devices()[:count])
  options = attention.AttentionOptions(select=selection.TopK(TOP_K), form=form)
  tokens_BT = models.random_tokens((ROWS, LENGTH))
  graph, state = nnx.split(models.tiny_model(num_layers=2, num_mtp_layers=0))

  @jax.jit
  def run(state, tokens_BT):
    output = nnx.merge(graph, state)(tokens_BT, options=options, record=True)
    return (
      output.dense.selection,
      output.moe.selection,
      output.moe.experts_BTA,
    )

  with jax.set_mesh(mesh):
    layout = jax.tree.map(lambda x: x.sharding, sharding.placed(state, mesh))
    return jax.device_get(
      run(
        jax.device_put(state, layout),
        jax.device_put(
          tokens_BT, sharding.batch_sharding(mesh, tokens_BT.shape)
        ),
      )
    )


@pytest.mark.parametrize("form", ["expanded", "gathered"])
def test_choices_equal_those_of_one_device(form):
  want = choices({}, form)
  for name, mesh in MESHES.items():
    got = choices(mesh, form)
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(want)) == 3
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_array_equal(ours, theirs, err_msg=name)
