"""Numbers of a synthesis, and the histogram of its solutions' lengths."""

import collections
import pathlib
from typing import Any

from matplotlib import figure as figure_lib

from dsv32_jax.agents.synthesis.general import campaign

_COLORS = ("#1f5fbf", "#c0504d", "#3a8f4d", "#d79b00", "#7b4fa3", "#4c4c4c")


def report(workdir: pathlib.Path, baseline_attempts: int) -> dict[str, Any]:
  """Counts what the folder holds.

  Returns:
    JSON-able numbers; `baselines` are shares of solved attempts, `seconds` of
    processor time by part, `solution_calls` lengths by kind of task.
  """
  domains, kinds, levels, reasons, attempts, solved = (
    collections.Counter() for _ in range(6)
  )
  fingerprints, pairs, lengths, wrong = set(), set(), {}, []
  for record in campaign.read(workdir / campaign.ENVIRONMENTS_FILE):
    domains[record["domain"]] += 1
    fingerprints.add(record["fingerprint"])
    pairs.add(record["pair"])
    for task in record["tasks"]:
      kinds[task["kind"]] += 1
      levels[task["level"]] += 1
      attempts[task["attempts_until_solved"]] += 1
      solved.update(task["baselines"])
      lengths.setdefault(task["kind"], []).append(task["solution_calls"])
      wrong.append(len(task["wrong_answers"]))
    for rejection in record["rejections"]:
      reasons[rejection["reason"]] += 1
  tasks = sum(kinds.values())
  seconds = collections.Counter()
  for row in campaign.read(workdir / campaign.SECONDS_FILE):
    del row["index"]
    seconds.update(row)
  played = tasks * baseline_attempts
  return {
    "environments": sum(domains.values()),
    "distinct_data": len(fingerprints),
    "pairs_of_schema_and_toolset": len(pairs),
    "tasks": tasks,
    "domains": dict(domains),
    "kinds": dict(kinds),
    "levels": {str(level): levels[level] for level in sorted(levels)},
    "rejections": dict(reasons.most_common()),
    "attempts_until_solved": {str(n): attempts[n] for n in sorted(attempts)},
    "wrong_answers_refused": {
      "number": sum(wrong),
      "fewest_of_a_task": min(wrong, default=0),
    },
    "baselines": {
      name: number / played if played else None
      for name, number in solved.items()
    },
    "solution_calls": {
      kind: {
        "least": min(values),
        "mean": round(sum(values) / len(values), 1),
        "greatest": max(values),
      }
      for kind, values in lengths.items()
    },
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
  }


def histogram(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Draws how many tool calls the solutions take, by kind of task."""
  lengths: dict[str, list[int]] = {}
  for record in campaign.read(workdir / campaign.ENVIRONMENTS_FILE):
    for task in record["tasks"]:
      lengths.setdefault(task["kind"], []).append(task["solution_calls"])
  kinds = sorted(lengths)
  number = sum(map(len, lengths.values()))
  figure = figure_lib.Figure(figsize=(7.2, 4.2), layout="constrained")
  axes = figure.add_subplot()
  axes.hist(
    [lengths[kind] for kind in kinds],
    bins=40,
    stacked=True,
    label=kinds,
    color=[_COLORS[i % len(_COLORS)] for i in range(len(kinds))],
  )
  axes.set_title(f"Lengths of the solutions of {number} general tasks")
  axes.set_xlabel("length of a solution (tool calls)")
  axes.set_ylabel("tasks (number)")
  axes.legend(title="kind of task")
  figure.savefig(path, dpi=130)
