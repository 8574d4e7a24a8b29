"""Rooflines of the kernels, a panel for each TPU generation.

A panel draws what a device could do at each number of operations a byte, and
for each scheduled kernel the most that its schedule allows: the peak, divided
by its bundles over the fewest its products take, or what memory allows if that
is less. Bundles below that number, which a schedule may have, count as it.
"""

import pathlib

import matplotlib
import matplotlib.pyplot as plt

from experiments import kernels_ratios
from pallas_kernels import roofline

MARKERS = "os^DvP*X<>"


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draws the schedules among rows into a PNG file."""
  points = [point(row) for row in rows if row["mode"] == "schedule_row"]
  points = [found for found in points if found is not None]
  names = list(dict.fromkeys(name for _, name, _, _ in points))
  shown = [g for g in roofline.MXU if any(g == found[0] for found in points)]
  matplotlib.use("Agg")
  figure, panels = plt.subplots(
    1,
    max(1, len(shown)),
    squeeze=False,
    sharex=True,
    sharey=True,
    figsize=(16, 6),
  )
  for generation, panel in zip(shown, panels[0]):
    of_panel = [found for found in points if found[0] == generation]
    _roof(panel, generation, [intensity for _, _, intensity, _ in of_panel])
    for number, name in enumerate(names):
      chosen = [found for found in of_panel if found[1] == name]
      panel.scatter(
        [intensity for _, _, intensity, _ in chosen],
        [rate for _, _, _, rate in chosen],
        marker=MARKERS[number % len(MARKERS)],
        label=name,
      )
    panel.set(xscale="log", yscale="log", title=f"{generation}, one device")
    panel.set(xlabel="operations a byte of arguments and results")
    panel.grid(visible=True, which="both", alpha=0.2)
  panels[0][0].set(ylabel="bfloat16, Tera-operations a second")
  figure.suptitle(
    "The most that each kernel's static schedule allows (no stall counted)"
  )
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="lower center", ncols=4)
  figure.tight_layout(rect=(0, 0.14, 1, 1))
  figure.savefig(path, dpi=100)
  plt.close(figure)


def point(row: dict) -> tuple[str, str, float, float] | None:
  """Returns (generation, kernel, operations a byte, Tera-operations a second).

  None for a kernel whose products are not measured.
  """
  found = kernels_ratios.measure(row)
  if found is None or found.plain is None or row["dtype"] not in ("bfloat16",):
    return None
  case, name = kernels_ratios.case_of(row), kernels_ratios.kernel_name(row)
  generation = kernels_ratios.generation(row)
  work = roofline.work(case, row["dtype"], "forward")
  if "backward" in name or "gradients" in name:
    both = roofline.work(case, row["dtype"], "forward_backward")
    work = roofline.Work(both.flops - work.flops, both.bytes)
  share = found.plain / max(found.waste * found.bundles, found.plain)
  on, intensity = roofline.device(generation), work.flops / work.bytes
  rate = min(share * on.flops[row["dtype"]], intensity * on.bytes)
  return generation, name, intensity, rate / 1e12


def _roof(panel, generation, intensities) -> None:
  on = roofline.device(generation)
  peak = on.flops["bfloat16"]
  ridge = peak / on.bytes
  ends = sorted([0.5 * min(intensities), ridge, 2.0 * max(intensities)])
  roof = [min(peak, x * on.bytes) / 1e12 for x in ends]
  panel.plot(ends, roof, color="black", label="peak, and main memory's")
