"""What the compiler gets does not grow with the layers of the 671B model."""

import dataclasses
import re

import jax
import pytest

from configs import deepseek_v32_671b
from dsv32_jax import config_files
from dsv32_jax import sharding
from dsv32_jax.training import ahead
from dsv32_jax.training import optimizer
from dsv32_jax.training import run
from dsv32_jax.training import step as step_lib

MESH = sharding.MeshConfig(fsdp=2, expert=2, context=2)


def lowered(layers: int) -> str:
  """The text of the sparse step on eight devices, at full width."""
  config = config_files.build(
    run.TrainConfig, deepseek_v32_671b.get_config("sparse")
  )
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_layers=layers),
    data=dataclasses.replace(config.data, batch_size=4, sequence_length=4096),
    microbatches=1,
    mesh=MESH,
  )
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    graph, state = run.abstract_state(config, mesh)
    step = step_lib.make_step(
      graph,
      config.stage,
      optimizer.make_optimizer(config.optimizer),
      remat=run.REMAT[config.remat],
    )
    return step.lower(state, ahead.abstract_batch(config, mesh)).as_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_671b_step_has_the_same_instructions_at_any_depth():
  def instructions(text):
    # Without sizes, constants and the names of values.
    return [re.sub(r"\d+", "N", line) for line in text.splitlines()]

  few, many = (instructions(lowered(layers)) for layers in (5, 61))
  assert len(few) > 1000
  assert few == many
