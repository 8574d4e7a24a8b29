"""Plots of the generation benchmark, and its speed-ups as text."""

import json
import pathlib

from dsv32_jax.evals import plots

NAMES = {
  "engine": "DSA, engine with pages",
  "dsa": "DSA, plain cache",
  "dense": "dense, plain cache",
}


def load(results: pathlib.Path) -> list[dict]:
  """Reads a file of JSON lines; the last one of a row counts."""
  keys = ("job", "side", "variant", "batch", "length", "threads")
  rows = [json.loads(row) for row in results.read_text().splitlines()]
  return list({tuple(row[key] for key in keys): row for row in rows}.values())


def write(results: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Draws the plots that there are rows for, and prints the speed-ups.

  Returns:
    The lines printed: steps of transformers over ours, at equal batch and
    length, by the faster of its variants.
  """
  rows = load(results)
  positions = _series(rows, "position", "length", lambda row: row["seconds"])
  if positions:
    plots.lines(
      folder / "position.png",
      {
        NAMES[name]: (x, [1000 * seconds for seconds in y])
        for (_, name), (x, y) in positions.items()
      },
      title="Decoding behind a long context, 100M model, CPU",
      x_label="tokens in context",
      y_label="milliseconds a token",
      log_x=True,
      markers=True,
      from_zero=True,
    )
  batches = _series(
    rows, "throughput", "batch", lambda row: row["batch"] / row["seconds"]
  )
  if batches:
    length = next(r["length"] for r in rows if r["job"] == "throughput")
    plots.lines(
      folder / "throughput.png",
      {f"{side}, {name}": line for (side, name), line in batches.items()},
      title=f"Decoding behind {length} tokens each, 65M model, CPU",
      x_label="sequences in the batch",
      y_label="tokens a second",
      log_x=True,
      markers=True,
      from_zero=True,
    )
  lines = list(_faster(rows))
  for text in lines:
    print(text)
  return lines


def _series(rows, job, along, value):
  """Lines by (side, variant): sorted places and their values."""
  found = {}
  for row in rows:
    if row["job"] == job:
      points = found.setdefault((row["side"], row["variant"]), [])
      points.append((row[along], value(row)))
  return {name: tuple(zip(*sorted(points))) for name, points in found.items()}


def _faster(rows):
  """Yields transformers' seconds over ours, by batch."""
  ours, peer = {}, {}
  for row in rows:
    if row["job"] == "throughput":
      place = row["batch"], row["length"]
      side = ours if row["side"] == "ours" else peer
      side.setdefault(place, []).append(row)
  for place in sorted(ours.keys() & peer.keys()):
    wall, cpu = (
      min(r[name] for r in peer[place]) / min(r[name] for r in ours[place])
      for name in ("seconds", "cpu_seconds")
    )
    yield (
      f"batch {place[0]}, {place[1]} tokens: {wall:.1f}x faster than"
      f" transformers ({cpu:.1f}x by CPU time)"
    )
