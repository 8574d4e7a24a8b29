"""The results of experiments.kernels as a table and a roofline plot.

python -m experiments.kernels_table RESULTS.jsonl README.md

What is between the two markers of the file becomes the table of the last
timings of each device, and of what the checks found; kernels_roofline.png is
drawn beside RESULTS.jsonl, and linked if that is below the file's folder.
"""

import json
import math
import pathlib
import sys

import matplotlib
import matplotlib.pyplot as plt

from experiments import readme_block
from pallas_kernels import roofline

BEGIN = "<!-- kernels: begin -->"
END = "<!-- kernels: end -->"
PLOT = "kernels_roofline.png"
KEY = ("device", "operation", "case", "dtype", "direction", "implementation")


def latest(rows: list[dict]) -> list[dict]:
  """Returns the last timing of each kind."""
  found = {}
  for row in rows:
    if row.get("mode") == "bench":
      found[tuple(row[name] for name in KEY)] = row
  return list(found.values())


def table(rows: list[dict]) -> str:
  """Renders Markdown: a table a device, and a line on the checks.

  Raises:
    ValueError: if nothing was timed.
  """
  timed = latest(rows)
  if not timed:
    raise ValueError("the results hold no timing: --mode=bench makes them")
  blocks = []
  for device in dict.fromkeys(row["device"] for row in timed):
    lines = [
      f"| {device} | sizes | type | implementation | ms | floor, ms | of the"
      " floor | faster than xla |",
      "|---" * 8 + "|",
    ]
    lines += [_line(row) for row in timed if row["device"] == device]
    blocks.append("\n".join(lines))
  return "\n\n".join([*blocks, _checks(rows)])


def _line(row) -> str:
  sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
  name = f"{row['operation']} {row['case']}, {row['direction']}"
  cells = [name, sizes, row["dtype"], row["implementation"]]
  for word in ("skipped", "failed"):
    if word in row:
      return (
        "| " + " | ".join([*cells, f"{word}: {row[word]}", "", "", ""]) + " |"
      )
  floor, share = row["floor_seconds"], row["share_of_floor"]
  cells += [
    f"{1000 * row['seconds']:.3f}",
    f"{1000 * floor:.3f}" if floor else "",
    f"{100 * share:.0f}%" if share else "",
    f"{row['ratio']:.2f}x" if row.get("ratio") else "",
  ]
  return "| " + " | ".join(cells) + " |"


def _checks(rows) -> str:
  checks = [
    row for row in rows if row.get("mode") == "check" and "passed" in row
  ]
  worst: dict[tuple[str, str], float] = {}
  for row in checks:
    key = (row["platform"], row["dtype"])
    worst[key] = max(worst.get(key, 0.0), row.get("error", math.inf))
  errors = ", ".join(f"{p} {d} {e:.1e}" for (p, d), e in worst.items())
  passed = sum(row["passed"] for row in checks)
  return (
    f"{passed} of {len(checks)} checks against the reference passed; largest"
    f" errors: {errors}. Floors are the longer of products at the device's peak"
    " and arguments and results moved once; `python -m experiments.kernels`."
  )


def plot(rows: list[dict], path: pathlib.Path) -> None:
  """Draws operations a second over operations a byte, a panel a device."""
  timed = [row for row in latest(rows) if "seconds" in row]
  devices = list(dict.fromkeys(row["device"] for row in timed))
  matplotlib.use("Agg")
  figure, panels = plt.subplots(
    1, len(devices), squeeze=False, figsize=(6 * len(devices), 4.5)
  )
  for device, panel in zip(devices, panels[0]):
    of_device = [row for row in timed if row["device"] == device]
    for name in dict.fromkeys(row["implementation"] for row in of_device):
      chosen = [row for row in of_device if row["implementation"] == name]
      panel.scatter(
        [row["flops"] / row["bytes"] for row in chosen],
        [row["flops"] / row["seconds"] / 1e12 for row in chosen],
        label=name,
      )
    _draw_roofs(panel, device, of_device)
    panel.set(xscale="log", yscale="log", title=device)
    panel.set(xlabel="operations a byte", ylabel="Tera-operations a second")
    panel.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _draw_roofs(panel, device: str, rows) -> None:
  """Draws what the device could do at each number of operations a byte."""
  peaks = roofline.device(device)
  if peaks is None:
    return
  intensity = sorted(row["flops"] / row["bytes"] for row in rows)
  ends = [intensity[0] / 4, intensity[-1] * 4]
  for dtype in dict.fromkeys(row["dtype"] for row in rows):
    if dtype in peaks.flops:
      ridge = peaks.flops[dtype] / peaks.bytes
      points = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
      roof = [min(peaks.flops[dtype], x * peaks.bytes) / 1e12 for x in points]
      panel.plot(points, roof, label=f"{dtype} peak")


def write(results: pathlib.Path, readme: pathlib.Path) -> None:
  """Replaces what is between the markers of a file by table and plot.

  Raises:
    ValueError: the file lacks the markers, or there are no timings.
  """
  rows = [json.loads(row) for row in results.read_text().splitlines()]
  readme_block.split(readme, BEGIN, END)
  body = table(rows)
  picture = results.with_name(PLOT).resolve()
  plot(rows, picture)
  if picture.is_relative_to(readme.resolve().parent):
    link = picture.relative_to(readme.resolve().parent).as_posix()
    body += f"\n\n![Roofline of the kernels]({link})"
  readme_block.replace(readme, BEGIN, END, body)


if __name__ == "__main__":
  try:
    write(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
