"""Budgets of schedules: how much the kernels may take of a device.

A budget is a dictionary, in a file as JSON: by "platform/operation/case/
dtype/direction", then by kernel. On a TPU that is the bundles of a tile; on a
GPU the instructions of the largest loop, the highest register, the bytes of
shared memory and how often the instructions of `COUNTED` occur.

A tile or a loop that grows by more than 2% is over budget, and so is anything
more of registers or shared memory, another count, a kernel that has no budget
and a budget without a kernel. Whatever the budget, no register may be spilled,
and the assembler may not warn, such as of C7511, products that wait for one
another. Figures of a GPU are those of the versions in constraints.txt: another
compiler's differ by a few percent.
"""

from collections.abc import Iterable, Iterator
import json
import pathlib

from pallas_kernels import cases
from pallas_kernels import checking
from pallas_kernels import problems
from pallas_kernels import schedule_gpu

SLACK = 1.02
# Products, asynchronous copies and sums in memory: those a Hopper kernel is
# written in, whatever the compiler makes of the rest.
COUNTED = ("HGMMA", "QGMMA", "UTMALDG", "UTMASTG", "LDGSTS", "REDG")
# Bundles or instructions of a loop that is worth a line.
SMALLEST_LOOP = 16

# What a row tells of each loop: its depth, the bundles of its code, how often
# it runs, what its code's products take at least and the copies it starts.
LOOP = ("depth", "bundles", "trips", "mxu_least", "dma")

# By problem and kernel: bundles of a TPU's, or limits by name of a GPU's.
Budget = dict[str, dict[str, int | dict]]


def key(result: dict) -> str:
  """Names a compiled problem."""
  parts = ("platform", "operation", "case", "dtype", "direction")
  return "/".join(result[part] for part in parts)


def plan(
  table: Iterable[cases.Case], platform: str, alone: bool
) -> Iterator[dict]:
  """Lists what to compile: the cases and types with a kernel.

  The kernels of the forward direction are among those of the gradient, so that
  one direction is enough.

  Args:
    table: the cases.
    platform: "tpu:" and a topology, or "gpu:" and a device.
    alone: whether a TPU's kernels are compiled without the rest.

  Raises:
    ValueError: for another platform, or if no operation has a kernel for it.
  """
  kind, _, target = platform.partition(":")
  if kind not in ("tpu", "gpu") or not target:
    raise ValueError(
      f"--platform={platform} names no device to compile for, as tpu:v5p:2x2x1"
      " or gpu:h200 do"
    )
  offered = [case for case in table if checking.offers(case.operation, kind)]
  if not offered:
    raise ValueError(f"no operation has kernels for {kind!r}")
  for case in offered:
    for dtype in case.dtypes:
      yield {
        "platform": platform,
        "operation": case.operation,
        "case": case.name,
        "dtype": dtype,
        "direction": problems.directions(case.operation)[-1],
        "implementation": kind,
        "alone": alone and kind == "tpu",
      }


def sizes(results: list[dict]) -> Budget:
  """Returns the budget that results just keep."""
  return {
    key(result): {k["name"]: _size_of(k) for k in result["kernels"]}
    for result in results
    if "kernels" in result
  }


def _size_of(kernel):
  if "registers" not in kernel:
    return kernel["tile"]
  counts = kernel["opcodes"]
  return {
    "instructions": kernel["tile"],
    "registers": kernel["highest_register"],
    "shared_bytes": kernel["shared_bytes"],
    "opcodes": {name: counts[name] for name in COUNTED if name in counts},
  }


def read(path: pathlib.Path) -> Budget:
  """Reads a budget.

  Raises:
    ValueError: if the file is not JSON, or no dictionary.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds no budget")
  return found


def write(path: pathlib.Path, results: list[dict]) -> None:
  """Writes what results take; other entries of the file stay as they are."""
  entries = read(path) if path.exists() else {}
  entries |= sizes(results)
  text = json.dumps(entries, indent=2, sort_keys=True)
  path.write_text(text + "\n", encoding="utf-8")


def exceeded(budget: Budget, results: list[dict]) -> list[str]:
  """Lists what is over budget, a line each."""
  lines = []
  for result in results:
    name = key(result)
    allowed = budget.get(name, {})
    kernels = {kernel["name"]: kernel for kernel in result.get("kernels", ())}
    for kernel in sorted(allowed.keys() | kernels.keys()):
      if kernel not in kernels:
        reasons = ["a budget, but not compiled"]
      elif kernel not in allowed:
        reasons = [f"{_size_of(kernels[kernel])}, no budget"]
      else:
        reasons = _over(kernels[kernel], allowed[kernel])
      reasons += _faults(kernels.get(kernel, {}))
      lines += [f"{name} {kernel}: {reason}" for reason in reasons]
  return lines


def faults(results: list[dict]) -> list[str]:
  """Lists what no budget allows: spills, and warnings of the assembler."""
  return [
    f"{key(result)} {kernel['name']}: {reason}"
    for result in results
    for kernel in result.get("kernels", ())
    for reason in _faults(kernel)
  ]


def _over(kernel, allowed) -> list[str]:
  """Says in what a kernel takes more than it may."""
  taken = _size_of(kernel)
  if not isinstance(taken, dict):
    return _more("bundles", taken, allowed, SLACK)
  reasons = _more(
    "instructions", taken["instructions"], allowed["instructions"], SLACK
  )
  for name in ("registers", "shared_bytes"):
    reasons += _more(name, taken[name], allowed[name])
  for name in COUNTED:
    count, wanted = (x["opcodes"].get(name, 0) for x in (taken, allowed))
    if count != wanted:
      reasons.append(f"{count} {name}, not {wanted}")
  return reasons


def _more(what, taken, allowed, slack=1.0) -> list[str]:
  over = taken > slack * allowed
  return [f"{taken} {what}, more than {allowed}"] if over else []


def _faults(kernel) -> list[str]:
  """Says what no kernel of a GPU may do."""
  spilled = [
    f"{kernel[name]} {name}"
    for name in ("spill_bytes", "spill_instructions")
    if kernel.get(name)
  ]
  return spilled + kernel.get("warnings", [])


def rows(result: dict) -> list[dict]:
  """Returns a row for the largest loop of each TPU kernel.

  `bundles` and `minimum_cycles` are of one trip: what it executes, and what
  its matrix products alone would take; the slots are shares from 0 to 1, `dma`
  counts the copies that its code starts. `loops` are all loops of the kernel,
  each a list of the values of `LOOP`.
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
        "dma": loop["dma"],
        "temp_bytes": None if result["alone"] else result["temp_bytes"],
        "loops": [[x[name] for name in LOOP] for x in kernel["loops"]],
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
