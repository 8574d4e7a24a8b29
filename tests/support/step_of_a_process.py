"""One step of a stage in one of several processes; process 0 writes metrics.

Run as `python -m tests.support.step_of_a_process COORDINATOR COUNT ID FILE`.
"""

import json
import sys

import jax

from dsv32_jax import sharding
from tests.support import stage_steps

STAGE = stage_steps.STAGES["sparse"]
MODEL = dict(num_layers=2, num_mtp_layers=0)
MESH = sharding.MeshConfig(fsdp=2, expert=2, context=2)


def main(coordinator, count, number, path):
  jax.distributed.initialize(coordinator, int(count), int(number))
  metrics, _ = stage_steps.one_step(
    STAGE,
    stage_steps.packed_batch(),
    mesh_config=MESH,
    with_state=False,
    **MODEL,
  )
  if jax.process_index() == 0:
    with open(path, "w", encoding="utf-8") as file:
      json.dump({name: float(value) for name, value in metrics.items()}, file)


if __name__ == "__main__":
  main(*sys.argv[1:])
