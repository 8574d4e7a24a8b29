"""Times functions of arrays on the device that JAX runs on."""

from collections.abc import Callable, Sequence
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import roofline

# A sample is long enough for the clock and for the cost of queueing a call.
SAMPLE_SECONDS = 0.02
SAMPLES = 10


class Timing(NamedTuple):
  """Seconds of one call: the median and the least of all samples."""

  median: float
  least: float


def time_calls(
  function: Callable[[Any], Any], inputs: Sequence[Any], *, budget: float = 2.0
) -> Timing:
  """Times a compiled function on several sets of inputs.

  Calls are queued one after another until a sample is long enough, and the
  last is waited for. At least one sample of each set is taken, after a call
  that is not timed.

  Args:
    function: takes one set of inputs; compiled before.
    inputs: the sets.
    budget: seconds after which a set gets no further sample.
  """
  samples = []
  for arrays in inputs:
    began = time.perf_counter()
    jax.block_until_ready(function(arrays))
    once = time.perf_counter() - began
    calls = max(1, min(100, int(SAMPLE_SECONDS / max(once, 1e-6))))
    until = time.perf_counter() + budget
    for _ in range(SAMPLES):
      began = time.perf_counter()
      for _ in range(calls):
        last = function(arrays)
      jax.block_until_ready(last)
      samples.append((time.perf_counter() - began) / calls)
      if time.perf_counter() > until:
        break
  return Timing(statistics.median(samples), min(samples))


def peaks(device: jax.Device) -> roofline.Device | None:
  """Returns the peaks of a device; a CPU's is that of a large product here."""
  if device.platform != "cpu":
    return roofline.device(device.device_kind)
  size = 1024
  ones = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
  seconds = time_calls(product, [ones], budget=0.5).least
  return roofline.Device(
    name="cpu",
    flops={"float32": 2 * size**3 / seconds},
    bytes=None,
    source=f"a float32 product of {size} x {size}, measured here",
  )
