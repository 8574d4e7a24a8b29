"""Plots of a report: line and bar charts with titles, units and legends."""

from collections.abc import Mapping, Sequence

from matplotlib import figure as figure_lib
import numpy as np

COLORS = {
  "dense": "#4c4c4c",
  "dsa": "#1f5fbf",
  "random": "#c0504d",
  "window": "#d79b00",
  "best": "#3a8f4d",
}
_OTHERS = ("#1f5fbf", "#c0504d", "#3a8f4d", "#d79b00", "#7b4fa3", "#4c4c4c")
_DPI = 130
# Inches.
_WIDTH = 7.2
# Entries of a legend that find room beside the lines.
_FEW = 4


def lines(
  path,
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str,
  x_label: str,
  y_label: str,
  log_x: bool = False,
  log_y: bool = False,
  markers: bool = False,
  from_zero: bool = False,
  kinds: Mapping[str, str] | None = None,
) -> None:
  """Draws one line a series into a PNG file.

  Args:
    path: of the file.
    series: (x, y) by name, as the legend calls it.
    title: of the chart.
    x_label: with its unit.
    y_label: with its unit.
    log_x: logarithmic x axis, base 2, ticks at the points.
    log_y: logarithmic y axis, base 10.
    markers: draw the points too.
    from_zero: the y axis begins at 0.
    kinds: what each series is one of; those of a kind have one color and one
      entry in the legend. Default: each is of its own.
  """
  figure, axes = _axes(title, x_label, y_label)
  kinds = kinds or {name: name for name in series}
  order = list(dict.fromkeys(kinds.values()))
  named = set()
  for name, (x, y) in series.items():
    kind = kinds[name]
    axes.plot(
      x,
      y,
      label=None if kind in named else kind,
      color=_color(kind, order.index(kind)),
      marker="o" if markers else None,
      linewidth=1.6,
    )
    named.add(kind)
  if log_x:
    ticks = sorted({value for x, _ in series.values() for value in x})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
  if log_y:
    axes.set_yscale("log")
  if from_zero:
    axes.set_ylim(bottom=0)
  if len(order) > _FEW:
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
  else:
    axes.legend()
  figure.savefig(path, dpi=_DPI)


def bars(
  path,
  groups: Mapping[str, Mapping[str, tuple[float, float]]],
  *,
  title: str,
  y_label: str,
  from_zero: bool = False,
  digits: int = 3,
) -> None:
  """Draws groups of bars, a value and half its interval each, into a PNG.

  Args:
    path: of the file.
    groups: group -> bar -> (value, half interval); NaN draws no interval.
    title: of the chart.
    y_label: with its unit.
    from_zero: whether the axis begins at 0; else at what shows differences,
      which the axis label says.
    digits: behind the point of a bar's value.
  """
  if not from_zero:
    y_label += " (axis does not begin at 0)"
  # Room for the labels of many groups.
  figure, axes = _axes(title, "", y_label, width=max(_WIDTH, 1.1 * len(groups)))
  names = list(dict.fromkeys(n for group in groups.values() for n in group))
  width = 0.8 / len(names)
  low, high = np.inf, -np.inf
  for i, name in enumerate(names):
    for j, group in enumerate(groups.values()):
      if name not in group:
        continue
      value, half = group[name]
      half = 0.0 if np.isnan(half) else half
      low, high = min(low, value - half), max(high, value + half)
      place = j + (i - (len(names) - 1) / 2) * width
      axes.bar(
        place,
        value,
        width * 0.92,
        yerr=half or None,
        capsize=3,
        color=_color(name, i),
        label=name if j == 0 else None,
      )
      axes.annotate(
        f"{value:.{digits}f}",
        (place, value + half),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
      )
  room = (high - low) * 0.15 or 0.1
  axes.set_ylim(0 if from_zero else low - room, high + room)
  axes.set_xticks(range(len(groups)), list(groups))
  axes.legend(ncols=len(names), loc="upper center", fontsize=8)
  axes.set_ylim(top=high + 2 * room)
  figure.savefig(path, dpi=_DPI)


def _axes(title, x_label, y_label, width=_WIDTH):
  """An axes on a figure of its own, apart from any interactive window."""
  figure = figure_lib.Figure(figsize=(width, 4.2), layout="constrained")
  axes = figure.add_subplot()
  axes.set_title(title, fontsize=11)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.grid(visible=True, alpha=0.3)
  axes.set_axisbelow(True)
  return figure, axes


def _color(name: str, place: int) -> str:
  return COLORS.get(name, _OTHERS[place % len(_OTHERS)])
