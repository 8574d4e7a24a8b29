"""Wall-clock time and memory of a function, for benchmarks."""

from collections.abc import Callable
import os
import pathlib
import statistics
import time
from typing import Any


def measure(
  run: Callable[[], Any],
  *,
  runs: int = 5,
  budget: float = 40.0,
  warm_up: bool = True,
) -> dict[str, Any]:
  """Runs a function once to warm up and then several times.

  Args:
    run: returns when its work is done.
    runs: most timed runs.
    budget: seconds after which no further run starts; one always does.
    warm_up: whether to run it once untimed; else `first_seconds` is missing.

  Returns:
    `seconds` (median), `runs` (each), `cpu_seconds` (median of all threads),
    `first_seconds` (the warm-up, compilation included), `other_cpus` (how
    many CPUs other processes kept busy: 0 on a machine of one's own) and
    `peak_rss_bytes` of the process so far.
  """
  first = {}
  if warm_up:
    began = time.perf_counter()
    run()
    first["first_seconds"] = time.perf_counter() - began
  times, busy = [], []
  all_busy, since = _busy_seconds(), time.perf_counter()
  while len(times) < runs and (not times or sum(times) < budget):
    began, busy_before = time.perf_counter(), time.process_time()
    run()
    times.append(time.perf_counter() - began)
    busy.append(time.process_time() - busy_before)
  elapsed = time.perf_counter() - since
  return first | {
    "seconds": statistics.median(times),
    "runs": times,
    "cpu_seconds": statistics.median(busy),
    "other_cpus": max(0.0, _busy_seconds() - all_busy - sum(busy)) / elapsed,
    "peak_rss_bytes": peak_rss_bytes(),
  }


def _busy_seconds() -> float:
  """CPU time that all processes have used since Linux started."""
  fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
  user, nice, system, _, _, interrupt, soft = (int(x) for x in fields[:7])
  ticks = user + nice + system + interrupt + soft
  return ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int:
  """The most memory that this process has held resident, on Linux."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return 1024 * int(line.split()[1])
  raise OSError("/proc/self/status has no VmHWM")
