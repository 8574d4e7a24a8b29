"""How long a compiled step would take at the best, by arithmetic.

An estimate and no measurement: nothing of it has run.
"""

from typing import NamedTuple

from dsv32_jax.ahead import report as report_lib
from pallas_kernels import roofline

# Bytes a second that a JAX device sends over all its links in one direction:
# half of the bidirectional figure in Google's pages on v5p, v6e and TPU7x (of
# which a device is half a chip); v5e as 1600 Gbps.
LINK_BYTES = {"v5e": 200e9, "v5p": 600e9, "v6e": 400e9, "7x": 300e9}
ASSUMES = (
  "every product in bfloat16 at the peak of the matrix units; every byte"
  " that a device receives over all links at once, none of it hidden behind"
  " products; arguments read once, at the memory's peak, while products run;"
  " one turn of each loop that turns as often as the data need; no"
  " time for anything else"
)


class Estimate(NamedTuple):
  """Seconds of a step.

  Attributes:
    product_seconds: of the products that the program runs, the model's own at
      least.
    memory_seconds: of reading weights, and state or cache, once.
    exchange_seconds: of its collectives.
    step_seconds: the longer of the two, and then the exchange.
    mfu: share of the peak that the model's own operations reach in that time.
    assumes: what has to hold, as text.
  """

  product_seconds: float
  memory_seconds: float
  exchange_seconds: float
  step_seconds: float
  mfu: float
  assumes: str


def estimate(report: report_lib.Report, generation: str) -> Estimate:
  """Estimates the time of a step.

  Args:
    report: of the compiled step.
    generation: a name in LINK_BYTES.

  Raises:
    ValueError: for another generation.
  """
  if generation not in LINK_BYTES:
    raise ValueError(f"{generation=} is not one of {', '.join(LINK_BYTES)}")
  (device,) = (d for d in roofline.DEVICES if d.name == generation)
  peak = report.devices * device.flops["bfloat16"]
  # A kernel's loop over what is visible may count once; the model's own
  # operations are then the better bound.
  needed = max(report.program_flops_per_step, report.model_flops_per_step)
  products = needed / peak
  moved = sum(report.collective_bytes_per_device.values())
  exchange = moved / LINK_BYTES[generation]
  memory = report.argument_bytes_per_device / device.bytes
  seconds = max(products, memory) + exchange
  mfu = report.model_flops_per_step / (peak * seconds)
  return Estimate(products, memory, exchange, seconds, mfu, ASSUMES)
