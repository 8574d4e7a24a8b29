"""A step on eight devices equals the step on one."""

import numpy as np
import pytest

from dsv32_jax import sharding
from tests.support import stage_steps
from tests.support import tolerances

RTOL, _ = tolerances.TOLERANCE["float32"]

# Smaller than the other tests' model: a step for each mesh is compiled.
MODEL = dict(num_layers=2, num_mtp_layers=0)

MESHES = {
  "data8": dict(data=8),
  "fsdp8": dict(fsdp=8),
  "expert4_fsdp2": dict(expert=4, fsdp=2),
  "context4_data2": dict(context=4, data=2),
  "tensor4_fsdp2": dict(tensor=4, fsdp=2),
  "fsdp2_expert2_context2": dict(fsdp=2, expert=2, context=2),
  "expert2_context2_tensor2": dict(expert=2, context=2, tensor=2),
}


@pytest.fixture(scope="module")
def batch():
  return stage_steps.packed_batch()


@pytest.fixture(scope="module")
def single_device(batch):
  found = {}

  def of(name):
    if name not in found:
      found[name] = stage_steps.one_step(
        stage_steps.STAGES[name], batch, **MODEL
      )
    return found[name]

  return of


# The sparse stage runs every part, on every mesh. Parts that the other stages
# share with it need each axis once.
EACH_AXIS = ("expert4_fsdp2", "context4_data2", "tensor4_fsdp2")
# The rest is for `make slow`.
FAST = {
  ("sparse", "fsdp2_expert2_context2"),
  ("dense_warmup", "context4_data2"),
  ("pretrain", "expert4_fsdp2"),
}
CASES = [
  pytest.param(
    stage, mesh, marks=[] if (stage, mesh) in FAST else pytest.mark.slow
  )
  for stage in stage_steps.STAGES
  for mesh in (MESHES if stage == "sparse" else EACH_AXIS)
]


@pytest.mark.parametrize("stage, mesh", CASES)
def test_step_equals_single_device(single_device, batch, stage, mesh):
  want, _ = single_device(stage)
  got, _ = stage_steps.one_step(
    stage_steps.STAGES[stage],
    batch,
    mesh_config=sharding.MeshConfig(**MESHES[mesh]),
    **MODEL,
  )
  for key in want:
    np.testing.assert_allclose(got[key], want[key], rtol=RTOL, err_msg=key)
