"""A step of two processes with four devices each equals the step of one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.support import stage_steps
from tests.support import step_of_a_process
from tests.support import tolerances

ROOT = pathlib.Path(__file__).resolve().parents[2]
RTOL, _ = tolerances.TOLERANCE["float32"]


@pytest.mark.slow
def test_step_equals_single_device(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  output = tmp_path / "metrics.json"
  flags = "--xla_force_host_platform_device_count=4"
  workers = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", step_of_a_process.__name__),
        *(coordinator, "2", str(i), str(output)),
      ],
      cwd=ROOT,
      env=dict(
        os.environ, XLA_FLAGS=f"--xla_backend_optimization_level=0 {flags}"
      ),
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for worker in workers:
      _, errors = worker.communicate(timeout=250)
      assert worker.returncode == 0, errors
  finally:
    for worker in workers:
      worker.kill()
      with worker:
        pass
  want, _ = stage_steps.one_step(
    step_of_a_process.STAGE,
    stage_steps.packed_batch(),
    **step_of_a_process.MODEL,
  )
  got = json.loads(output.read_text())
  assert got.keys() == want.keys()
  for name, value in got.items():
    np.testing.assert_allclose(value, want[name], rtol=RTOL, err_msg=name)
