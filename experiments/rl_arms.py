"""What the experiments share that run several arms from several seeds."""

import collections
from collections.abc import Callable, Iterable
import json
import pathlib

from dsv32_jax.training import run


def follow(
  sweep: Iterable[tuple[str, dict]],
  describe: Callable[[dict], dict],
  workdir: pathlib.Path,
) -> dict[str, list[dict]] | None:
  """Goes through a sweep and writes WORKDIR/report.json after every run.

  Args:
    sweep: yields (arm, result) of each run; raises run.Stopped on a signal.
    describe: takes the results by arm and returns the report.
    workdir: where to.

  Returns:
    The results by arm; None, with a line printed, if a signal ended it.
  """
  results = collections.defaultdict(list)
  try:
    for arm, found in sweep:
      results[arm].append(found)
      text = json.dumps(describe(results), indent=1)
      (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
  except run.Stopped as stopped:
    print(f"{stopped}; the same command goes on from there")
    return None
  return results
