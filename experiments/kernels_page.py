"""The page of the kernels: tables and a roofline plot from recorded rows.

python -m experiments.kernels_page DOCS [RESULTS.jsonl ...]

RESULTS.jsonl are what `experiments.kernels --workdir` leaves. What they hold of
timings, checks and schedules is added to DOCS/kernels.jsonl, in place of rows
of the same kind; from all rows there DOCS/kernels.md and DOCS/kernels.png are
made. So a page can be made anew without compiling anything.
"""

import json
import pathlib
import sys

from experiments import kernels_plot
from experiments import kernels_ratios
from experiments import kernels_table
from pallas_kernels import roofline

ROWS, PAGE, PLOT = "kernels.jsonl", "kernels.md", "kernels.png"
# What tells rows of a mode apart.
KEYS = {
  "schedule_row": ("topology", "op", "case", "dtype", "kernel"),
  "memory": ("topology", "op", "case", "dtype"),
  "product": ("topology", "product", "way", "experts"),
  "bench": kernels_table.KEY,
  "check": ("platform", "operation", "case", "dtype", "implementation", "seed"),
}
TOP = """# The kernels by numbers

Nothing on this page but the last table has run on an accelerator: kernels are
compiled for TPUs that are not there, and the compiler's own schedule is read. A
bundle takes a cycle at best; stalls and waits for copies come on top. So a
ratio is the least that a kernel loses, not what it will lose. Made by

```
make schedule GENERATIONS="v5e v5p v6e 7x" SHAPES=real ARGS=--workdir=DIR
make schedule GENERATIONS="v5e v5p v6e 7x" SHAPES=long ARGS=--workdir=DIR
python -m experiments.kernels_products --platform=tpu:v5p:2x2x1 --workdir=DIR
python -m experiments.kernels_page docs DIR/kernels.jsonl
```

![Rooflines of the kernels](kernels.png)
"""
TARGETS = """## Against the targets

Bundles over the fewest that the products take, widths padded to the matrix unit
(128 on v5e and v5p, 256 on v6e and 7x); of selection, over the bundles of the
scores alone, for its longest search with ties; where keys are cut into
segments, list slots without a key included. Bold is over the target.
"""
KERNELS = """## Every kernel

Bundles of a unit of work and, in brackets, the ratio to its products' minimum.
What has no unit counts the bundles of a step of the grid, a loop of unknown
length once.
"""
COPIES = """## Decoding: who starts the copies

A copy is started by an instruction of the core, so that its loop bounds how
fast pages arrive: a step scores 2048 keys, 32 pages of 64, and starting their
copies takes longer than the rest of it.
"""
MEMORY = """## Temporary memory

Of a whole call, forward and gradient, what XLA does around the kernels
included (`--noalone`): GB of a device. The target is at most 4.
"""
PRODUCTS = """## Products of the experts

A device's 16 of 256 experts, 7168 x 2048, 32768 rows of bfloat16: millions of
bundles and, in brackets, over the fewest that the products take. On a TPU the
model takes `ragged_dot` for rows and their gradients, of which XLA makes a
kernel, and megablox `tgmm` for the matrices' gradients, where XLA multiplies
all rows for each expert and masks them (its own estimate in cycles).
`jax.nn.scaled_matmul` is not used: weights in blocks of 8 bits are brought to
bfloat16 when they are loaded.
"""
TIMED = """## Timed on a CPU

Of the plain XLA forms, which a CPU runs; sizes that it does in seconds.
"""


def merge(rows: list[dict], more: list[dict]) -> list[dict]:
  """Returns rows with those of the same kind replaced, sorted by kind.

  Of a whole program's schedule only its memory is kept.
  """
  found = {}
  for row in filter(None, map(_kept, [*rows, *more])):
    names = KEYS[row["mode"]]
    found[row["mode"], *(str(row.get(name)) for name in names)] = row
  return [found[kind] for kind in sorted(found)]


def _kept(row):
  """Returns what the page keeps of a row, or None."""
  mode, size = row["mode"], row.get("temp_bytes")
  if mode == "schedule" and not row["alone"] and size is not None:
    return {
      "mode": "memory",
      "topology": row["platform"].removeprefix("tpu:"),
      "op": row["operation"],
      "case": row["case"],
      "dtype": row["dtype"],
      "temp_bytes": size,
    }
  of_whole = mode == "schedule_row" and size is not None
  return row if mode in KEYS and not of_whole else None


def page(rows: list[dict]) -> str:
  """Renders the page; a part without rows is left out."""
  schedules = [row for row in rows if row["mode"] == "schedule_row"]
  parts = [
    (TARGETS, _targets(schedules)),
    (KERNELS, _kernels(schedules)),
    (COPIES, _copies(schedules)),
    (MEMORY, _memory([row for row in rows if row["mode"] == "memory"])),
    (PRODUCTS, _products([row for row in rows if row["mode"] == "product"])),
  ]
  if kernels_table.latest(rows):
    parts.append((TIMED, kernels_table.table(rows)))
  return "\n".join([TOP, *(f"{a}\n{b}\n" for a, b in parts if b)])


def by_generation(rows, cell) -> str:
  """Renders a table with a column a TPU generation.

  Args:
    rows: tuples of (name, generation, row).
    cell: function of the row.
  """
  columns = [g for g in roofline.MXU if any(g == row[1] for row in rows)]
  lines = [["", *columns], ["---"] * (len(columns) + 1)]
  for name in dict.fromkeys(row[0] for row in rows):
    cells = {g: cell(row) for n, g, row in rows if n == name}
    lines.append([name, *(cells.get(g, "-") for g in columns)])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines if rows)


def _named(rows, name):
  return [(name(row), kernels_ratios.generation(row), row) for row in rows]


def _targets(rows) -> str:
  rows = [row for row in rows if kernels_ratios.target(row)]
  order = list(kernels_ratios.TARGETS)
  rows.sort(
    key=lambda row: order.index(
      (kernels_ratios.kernel_name(row), kernels_ratios.case_of(row).keys)
    )
  )

  def name(row):
    keys = kernels_ratios.case_of(row).keys // 1024
    return f"{kernels_ratios.kernel_name(row)}, {keys}K keys"

  def cell(row):
    ratio = kernels_ratios.measure(row).ratio
    most = kernels_ratios.target(row)
    text = f"**{ratio:.2f}**" if ratio > most else f"{ratio:.2f}"
    return f"{text} of {most:g}"

  return by_generation(_named(rows, name), cell)


def _kernels(rows) -> str:
  def name(row):
    found = kernels_ratios.measure(row)
    unit = f" ({found.unit})" if found else ""
    kernel = kernels_ratios.kernel_name(row)
    return f"{kernel}, {row['case']}, {row['dtype']}{unit}"

  def cell(row):
    found = kernels_ratios.measure(row)
    if found is None:
      return f"{max(loop[1] for loop in row['loops'])}"
    return f"{found.bundles:.0f} ({found.ratio:.2f})"

  return by_generation(_named(rows, name), cell)


def _copies(rows) -> str:
  rows = [row for row in rows if row["op"] == "decode_scores"]

  def name(row):
    return f"{kernels_ratios.kernel_name(row)}, {row['case']}"

  def cell(row):
    (_, bundles, _, _, started), *inner = row["loops"]
    of_loops = [loop for loop in inner if loop[4]]
    own = started - sum(loop[4] for loop in of_loops)
    rates = " and ".join(f"{b} bundles for {n}" for _, b, _, _, n in of_loops)
    bundles -= sum(loop[1] for loop in inner)
    return f"{own} in a step of {bundles} bundles; in loops {rates}"

  return by_generation(_named(rows, name), cell)


def _memory(rows) -> str:
  return by_generation(
    _named(rows, lambda row: f"{row['op']}, {row['case']}, {row['dtype']}"),
    lambda row: f"{row['temp_bytes'] / 1e9:.2f}",
  )


def _products(rows) -> str:
  def cell(row):
    if "failed" in row:
      return row["failed"]
    return f"{row['bundles'] / 1e6:.2f} M ({row['ratio']:.2f})"

  return by_generation(
    _named(rows, lambda row: f"{row['product']}: {row['way']}"), cell
  )


def write(docs: pathlib.Path, results: list[pathlib.Path]) -> None:
  """Adds results to the rows of a folder and makes its page and plot.

  Raises:
    ValueError: a line that is no JSON, or no rows at all.
    OSError: a file that is not there.
  """
  kept = docs / ROWS
  files = [*([kept] if kept.exists() else []), *results]
  read = [read_rows(path) for path in files]
  rows = merge([], [row for found in read for row in found])
  if not rows:
    raise ValueError(f"{docs} has no rows, and no results were given")
  docs.mkdir(parents=True, exist_ok=True)
  kept.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  (docs / PAGE).write_text(page(rows), "utf-8")
  kernels_plot.draw(rows, docs / PLOT)


def read_rows(path: pathlib.Path) -> list[dict]:
  """Reads JSON lines; ValueError names the file if one is none."""
  try:
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON lines: {error}") from error


if __name__ == "__main__":
  if len(sys.argv) < 2:
    sys.exit("error: give the folder of the page, then files of results")
  try:
    write(pathlib.Path(sys.argv[1]), [pathlib.Path(x) for x in sys.argv[2:]])
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
