"""Wall-clock time and memory of a function, for benchmarks."""

from collections.abc import Callable
import pathlib
import statistics
import time
from typing import Any


def measure(
  run: Callable[[], Any], *, runs: int = 5, budget: float = 40.0
) -> dict[str, Any]:
  """Runs a function once to warm up and then several times.

  Args:
    run: returns when its work is done.
    runs: most timed runs.
    budget: seconds after which no further run starts; one always does.

  Returns:
    `seconds` (median), `runs` (each), `cpu_seconds` (median of all threads),
    `first_seconds` (the warm-up, compilation included) and `peak_rss_bytes`
    of the process so far.
  """
  began = time.perf_counter()
  run()
  first = time.perf_counter() - began
  times, busy = [], []
  while len(times) < runs and (not times or sum(times) < budget):
    began, busy_before = time.perf_counter(), time.process_time()
    run()
    times.append(time.perf_counter() - began)
    busy.append(time.process_time() - busy_before)
  return {
    "seconds": statistics.median(times),
    "runs": times,
    "cpu_seconds": statistics.median(busy),
    "first_seconds": first,
    "peak_rss_bytes": peak_rss_bytes(),
  }


def peak_rss_bytes() -> int:
  """The most memory that this process has held resident, on Linux."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return 1024 * int(line.split()[1])
  raise OSError("/proc/self/status has no VmHWM")
