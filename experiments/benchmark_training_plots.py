"""Plots of the training benchmark, and its parts as a table."""

import json
import pathlib

from dsv32_jax.evals import plots

_KEYS = ("job", "variant", "length", "model", "remat", "threads")


def load(results: pathlib.Path) -> list[dict]:
  """Reads a file of JSON lines; the last one of a row counts."""
  rows = [json.loads(row) for row in results.read_text().splitlines()]
  return list({tuple(row[key] for key in _KEYS): row for row in rows}.values())


def write(results: pathlib.Path, folder: pathlib.Path) -> None:
  """Draws the plots, and prints how fast the input is beside the step."""
  rows = load(results)
  steps = sorted(
    (row for row in rows if row["job"] == "step"), key=lambda row: row["length"]
  )
  model = steps[0]["model"]
  common = dict(
    x_label="tokens of the sequence", log_x=True, markers=True, from_zero=True
  )
  plots.lines(
    folder / "speed.png",
    _series(steps, lambda row: row["length"] / row["seconds"]),
    title=f"A training step of `{model}`, CPU",
    y_label="tokens a second",
    **common,
  )
  plots.lines(
    folder / "time.png",
    _series(steps, lambda row: 1e3 * row["cpu_seconds"] / row["length"]),
    title=f"Work of a training step of `{model}`",
    y_label="milliseconds of CPU time a token",
    **common,
  )
  plots.lines(
    folder / "memory.png",
    _series(steps, lambda row: row["temporary_bytes"] / row["length"] / 1e3),
    title=f"Memory of a training step of `{model}` beside its state",
    y_label="kilobytes a token",
    **common,
  )
  profiled = [
    row for row in steps if row["variant"] == "dsa" and "parts" in row
  ]
  if profiled:
    plots.lines(
      folder / "parts.png",
      _shares(profiled),
      title=f"Parts of a sparse training step of `{model}`, CPU",
      y_label="percent of the time",
      **common,
    )
  for row in rows:
    if row["job"] == "input":
      fastest = max(step["length"] / step["seconds"] for step in steps)
      rate = row["tokens"] / row["seconds"]
      print(f"input: {rate / fastest:.1f} times as fast as the fastest step")


def parts_table(rows: list[dict], length: int) -> str:
  """The share of time of each part as a Markdown table, dense beside DSA.

  Raises:
    ValueError: if a row of that length is missing.
  """
  found = {
    row["variant"]: row["parts"]
    for row in rows
    if row["length"] == length and "parts" in row
  }
  if not {"dsa", "dense"} <= found.keys():
    raise ValueError(f"--parts_of={length} has not been profiled")
  lines = [f"| at {length} tokens | DSA | dense |", "|---|---|---|"]
  for part in found["dsa"] | found["dense"]:
    shares = (
      f"{100 * parts.get(part, 0.0) / sum(parts.values()):.1f}%"
      for parts in (found["dsa"], found["dense"])
    )
    lines.append(f"| {part} | {' | '.join(shares)} |")
  return "\n".join(lines)


def _series(steps, value):
  """Lines by variant."""
  found = {}
  for row in steps:
    x, y = found.setdefault(row["variant"], ([], []))
    x.append(row["length"])
    y.append(value(row))
  return found


def _shares(steps):
  """Lines by part: percent of the time of all parts."""
  names = dict.fromkeys(part for row in steps for part in row["parts"])
  lengths = [row["length"] for row in steps]
  return {
    name: (
      lengths,
      [
        100 * row["parts"].get(name, 0.0) / sum(row["parts"].values())
        for row in steps
      ],
    )
    for name in names
  }
