"""What a layer keeps for its backward pass is not computed again."""

import collections
import dataclasses

import jax
from jax.extend import core
import jax.numpy as jnp
import pytest

from dsv32_jax import sharding
from dsv32_jax.training import run
from dsv32_jax.training import step as step_lib
from tests.support import models
from tests.support import stage_steps

LAYERS = dict(num_layers=1, num_dense_layers=0, num_mtp_layers=0)
MESH = sharding.MeshConfig(context=2)


def traced(remat, form):
  """Counts the kernels by name, and products by the shape of their matrix."""
  model = models.tiny_model(dtype=jnp.bfloat16, **LAYERS)
  stage = dataclasses.replace(
    stage_steps.STAGES["sparse"], attention_form=form, kernels="tpu"
  )
  optimizer = stage_steps.make_optimizer()
  graph, state = step_lib.init_state(model, stage, optimizer)
  step = step_lib.make_step(graph, stage, optimizer, remat=run.REMAT[remat])
  mesh = sharding.make_mesh(MESH, jax.devices()[:2])
  found = collections.Counter()

  def walk(jaxpr):
    read = [v for equation in jaxpr.eqns for v in equation.invars]
    read = set(map(id, [*read, *jaxpr.outvars]))
    for equation in jaxpr.eqns:
      name = equation.primitive.name
      if name == "pallas_call":
        # One whose results nobody reads is left to the compiler to drop.
        if not read.isdisjoint(map(id, equation.outvars)):
          found[equation.params["name"]] += 1
      elif name == "dot_general":
        found[equation.invars[1].aval.shape] += 1
      else:
        for inner in core.jaxprs_in_params(equation.params):
          walk(inner)

  with jax.set_mesh(mesh):
    batch = stage_steps.packed_batch(rows=1, length=512)
    walk(step.trace(state, batch).jaxpr.jaxpr)
  return model.config, found


KERNEL = {"gathered": "sparse_mla", "expanded": "masked_attention_forward"}


@pytest.mark.parametrize(
  "form, remat, attention, others",
  [
    ("gathered", "layer", 2, 2),
    ("gathered", "save_selection", 2, 1),
    ("gathered", "save_attention", 1, 1),
    ("expanded", "save_attention", 1, 1),
  ],
)
def test_what_is_kept_runs_once(form, remat, attention, others):
  config, found = traced(remat, form)
  assert found[KERNEL[form]] == attention
  assert found["index_select"] == others
  # Its input gets no gradient, which would be another product.
  assert found[config.width, config.index_width] == others
