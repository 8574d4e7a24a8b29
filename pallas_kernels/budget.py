"""Budgets of schedules: how many bundles or instructions a tile may take.

A budget is a dictionary, in a file as JSON: by "platform/operation/case/
dtype/direction", then by kernel, the size of a tile. A kernel that grows by
more than 2% is over budget, and so is one that has none.
"""

import json
import pathlib

from pallas_kernels import schedule_gpu

SLACK = 1.02
# Bundles or instructions of a loop that is worth a line.
SMALLEST_LOOP = 16


def key(result: dict) -> str:
  """Names a compiled problem."""
  parts = ("platform", "operation", "case", "dtype", "direction")
  return "/".join(result[part] for part in parts)


def sizes(results: list[dict]) -> dict[str, dict[str, int]]:
  """Returns the budget that results just keep."""
  return {
    key(result): {k["name"]: k["tile"] for k in result["kernels"]}
    for result in results
    if "kernels" in result
  }


def read(path: pathlib.Path) -> dict[str, dict[str, int]]:
  """Reads a budget.

  Raises:
    ValueError: if the file is not JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def write(path: pathlib.Path, results: list[dict]) -> None:
  """Writes what results take; other entries of the file stay as they are."""
  entries = read(path) if path.exists() else {}
  entries |= sizes(results)
  text = json.dumps(entries, indent=2, sort_keys=True)
  path.write_text(text + "\n", encoding="utf-8")


def exceeded(
  budget: dict[str, dict[str, int]], results: list[dict]
) -> list[str]:
  """Lists what is over budget, a line each."""
  lines = []
  for name, kernels in sizes(results).items():
    for kernel, tile in kernels.items():
      allowed = budget.get(name, {}).get(kernel)
      if allowed is None:
        lines.append(f"{name} {kernel}: {tile}, no budget")
      elif tile > SLACK * allowed:
        lines.append(f"{name} {kernel}: {tile}, more than {allowed}")
  return lines


def rows(result: dict) -> list[dict]:
  """Returns a flat row for the largest loop of each TPU kernel.

  `bundles` and `minimum_cycles` are of one trip: what it executes, and what
  its matrix products alone would take; the slots are shares from 0 to 1.
  """
  found = []
  for kernel in result.get("kernels", ()):
    loops = [x for x in kernel["loops"] if x.get("step")]
    if not loops:
      continue
    loop = max(loops, key=lambda x: x["step"])
    least, shares = loop["mxu_least"], loop["shares"]
    found.append(
      {
        "mode": "schedule_row",
        "op": result["operation"],
        "pass": result["direction"],
        "case": result["case"],
        "dtype": result["dtype"],
        "topology": result["platform"].removeprefix("tpu:"),
        "kernel": kernel["name"],
        "bundles": loop["step"],
        "minimum_cycles": least,
        "ratio": loop["step"] / least if least else None,
        "mxu": shares["MXU"],
        "valu": shares["VALU"],
        "load": shares["VLOAD"],
        "store": shares["VSTORE"],
        "spill": shares["VSTORE:SPILL"],
      }
    )
  return found


def table(result: dict) -> str:
  """Describes a compiled problem: a line for it, each kernel and each loop."""
  for word in ("skipped", "failed"):
    if word in result:
      return f"{key(result)}: {word}, {result[word]}"
  temp = result["temp_bytes"] / 2**20
  lines = [f"{key(result)}: {temp:.0f} MiB temporary"]
  if result.get("executed"):
    lines[0] += (
      f", {result['executed']} bundles in all, {_percent(result)} of them the"
      " least of its products"
    )
  for kernel in result["kernels"]:
    lines.append(f"  {kernel['name']}: {_kernel(kernel)}")
    loops = [loop for loop in kernel["loops"] if _size(loop) >= SMALLEST_LOOP]
    lines += [f"    {_loop(loop)}" for loop in loops]
  return "\n".join(lines)


def _percent(result) -> str:
  plain, padded = (
    100 * result[name] / result["executed"]
    for name in ("mxu_minimum", "mxu_minimum_padded")
  )
  return f"{plain:.0f}% ({padded:.0f}% padded)"


def _size(loop) -> int:
  return loop.get("bundles") or loop["instructions"]


def _kernel(kernel) -> str:
  if "registers" not in kernel:
    return f"{kernel['tile']} bundles a tile"
  text = (
    f"{kernel['tile']} instructions a tile, {kernel['registers']} registers,"
    f" {kernel['spill_bytes']} B spilled, {kernel['shared_bytes']} B shared"
  )
  return "; ".join([text, *kernel["warnings"]])


def _loop(loop) -> str:
  if "instructions" in loop:
    counts = loop["opcodes"]
    often = sorted(
      counts, key=lambda name: (name not in schedule_gpu.TENSOR, -counts[name])
    )
    names = ", ".join(f"{name} {counts[name]}" for name in often[:8])
    return f"{loop['instructions']} instructions: {names}"
  text = "  " * loop["depth"] + f"{loop['bundles']} bundles"
  if loop["trips"] is not None:
    text += f" x {loop['trips']}"
  if loop["step"] not in (None, loop["bundles"]):
    text += f", {loop['step']} a step"
  if loop["mxu_least"]:
    least = loop["mxu_least"]
    text += f", products {least} ({100 * least / loop['step']:.0f}%)"
  shares = (f"{name} {100 * x:.0f}%" for name, x in loop["shares"].items())
  return f"{text}: {', '.join(shares)}"
