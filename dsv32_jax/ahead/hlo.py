"""What a compiled program sends between devices, read from its text.

A compiler's own count visits the body of a loop once. Here a loop counts as
often as it runs: as the compiler noted it, else the constant that its condition
compares with. A loop that runs as often as the data need (the rounds of the
expert exchange) counts once and is reported.

A TPU's compiler writes a reduce-scatter as an all-reduce and a slice in one
fusion; it counts as what it is.
"""

import collections
from collections.abc import Iterator
import math
import re
from typing import NamedTuple

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# Of the largest collectives.
_LISTED = 24
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# A type may be a tuple; its layout's parentheses follow a colon or another one.
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d\w*)?\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" [su](?:32|64)\[\]\S* constant\((\d+)\)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
# How the computation of such a fusion is named.
_SCATTER = "all-reduce-scatter"
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+)"
)


class Traffic(NamedTuple):
  """What one device receives by collectives, loops multiplied out.

  Attributes:
    bytes: by kind of collective, as along a ring: of an all-reduce among n
      devices 2 (n-1)/n of the array, of a reduce-scatter, a gather or an
      exchange (n-1)/n of the whole. A ragged exchange counts with the buffers
      that it may fill.
    instructions: in the program's text, by kind.
    open_loops: loops around a collective whose number of turns the program does
      not tell; each is counted as one turn.
    largest: (what, bytes), the most first: kind, result, and the operation of
      the model that it serves.
  """

  bytes: dict[str, int]
  instructions: dict[str, int]
  open_loops: int
  largest: list[tuple[str, int]]


class _Collective(NamedTuple):
  """What is the same in each turn of a loop."""

  kind: str
  result: str
  source: str


class _Computation(NamedTuple):
  lines: list[str]
  is_entry: bool


def traffic(text: str, devices: int) -> Traffic:
  """Counts the collectives of a compiled program.

  Args:
    text: of the optimised program, `compiled.as_text()`.
    devices: that it runs on.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations = dict(_computations(text))
  entries = [name for name, found in computations.items() if found.is_entry]
  if len(entries) != 1:
    raise ValueError(f"the program's text has {len(entries)} entries, not 1")
  found: dict[str, collections.Counter] = {}
  open_loops = set()

  def total(name) -> collections.Counter:
    """Bytes by collective of one run of a computation."""
    if name not in found:
      found[name] = collections.Counter()
      scatters = name.startswith(_SCATTER)
      for line in computations[name].lines:
        found[name] += one(line, scatters)
    return found[name]

  def one(line, scatters) -> collections.Counter:
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
      return collections.Counter()
    name, shape, operation = instruction.groups()
    kind = operation.removesuffix("-start")
    if kind in COLLECTIVES:
      if scatters and kind == "all-reduce":
        kind = "reduce-scatter of"
      what = _Collective(kind, " ".join(_results(shape)), _source(line))
      # A permutation lists pairs instead.
      pairs = kind == "collective-permute"
      size = devices if pairs else group_size(line, devices)
      received = _received(kind, _result_bytes(shape, operation), size)
      return collections.Counter({what: received})
    if operation == "while":
      body = re.search(r"body=%?([\w.\-]+)", line)[1]
      turns = _turns(line, computations)
      moved = total(body)
      if turns is None and moved:
        open_loops.add(name)
      times = 1 if turns is None else turns
      return collections.Counter({k: n * times for k, n in moved.items()})
    if operation == "conditional":
      return max(map(total, _branches(line)), key=lambda moved: moved.total())
    # A reduction's computation holds none.
    called = collections.Counter()
    for callee in _CALLED.findall(line):
      for what, size in total(callee).items():
        # What the compiler fused is often named by the fusion alone.
        named = what._replace(source=what.source or _source(line))
        called[named] += size
    return called

  moved = total(entries[0])
  by_kind, instructions = collections.Counter(), count(text)
  for what, size in moved.items():
    by_kind[what.kind.removesuffix(" of")] += size
  return Traffic(
    dict(sorted(by_kind.items())),
    instructions,
    len(open_loops),
    [(" ".join(what), size) for what, size in moved.most_common(_LISTED)],
  )


def count(text: str) -> dict[str, int]:
  """Counts the collectives in a program's text, by kind."""
  found = collections.Counter()
  for name, computation in dict(_computations(text)).items():
    for line in computation.lines:
      instruction = _INSTRUCTION.match(line)
      kind = instruction and instruction[3].removesuffix("-start")
      if kind == "all-reduce" and name.startswith(_SCATTER):
        kind = "reduce-scatter"
      if kind in COLLECTIVES:
        found[kind] += 1
  return dict(sorted(found.items()))


def _received(kind: str, result: int, size: int) -> int:
  """Bytes that a device of a group of `size` receives, along a ring."""
  if size == 1:
    return 0
  match kind:
    case "all-reduce":
      return 2 * result * (size - 1) // size
    case "reduce-scatter":
      return result * (size - 1)
    case "collective-permute":
      return result
  return result * (size - 1) // size


def group_size(instruction: str, devices: int) -> int:
  """Devices of a group of a collective, in each of the ways XLA prints them.

  Nothing for all devices, `[groups,devices]`, lists of devices, or the sizes of
  a mesh's axes and then those along which a group lies.
  """
  if "replica_groups={}" in instruction:
    return devices
  found = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction)
  if found is not None:
    return int(found[1])
  found = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction)
  if found is not None:
    return found[1].count(",") + 1
  found = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", instruction)
  if found is None:
    raise ValueError(f"no replica groups in {instruction}")
  sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
  # Of an axis that is only used in part: name:(what is before)size.
  axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", found[2])
  return math.prod(int(part or sizes[name]) for name, part in axes)


def most_gathered(text: str, devices: int) -> int:
  """Returns how many devices the widest all-gather joins."""
  gathers = re.findall(r" all-gather(?:-start)?\(.*", text)
  return max((group_size(line, devices) for line in gathers), default=1)


def sorts(text: str) -> list[int]:
  """Returns how many entries each sort of a program has, the most first."""
  found = []
  for shape in re.findall(r" = (.*?) sort\(", text):
    sizes = [extent.split(",") for _, extent in _SHAPE.findall(shape)]
    found.append(max(math.prod(int(n) for n in s if n) for s in sizes))
  return sorted(found, reverse=True)


def _computations(text: str) -> Iterator[tuple[str, _Computation]]:
  current = None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header is not None:
      current = _Computation([], header[1] is not None)
      yield header[2], current
    elif line == "}":
      current = None
    elif current is not None:
      current.lines.append(line)


def _turns(line: str, computations) -> int | None:
  """Returns how often a loop runs; None where only the data tell."""
  noted = _TRIPS.search(line)
  if noted is not None:
    return int(noted[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
  waiting, bounds = [condition], []
  while waiting:
    lines = computations[waiting.pop()].lines
    for inner in lines:
      waiting += _CALLED.findall(inner)
      bounds += [int(bound) for bound in _CONSTANT.findall(inner)]
  return max(bounds) if any(bounds) else None


def _branches(line: str) -> list[str]:
  names = []
  for several, one in _BRANCHES.findall(line):
    names += [name.strip().lstrip("%") for name in (several or one).split(",")]
  return names


def _source(line: str) -> str:
  named = _SOURCE.search(line)
  return named[1] if named else ""


def _results(shape: str) -> list[str]:
  return [f"{kind}[{extent}]" for kind, extent in _SHAPE.findall(shape)]


def _result_bytes(shape: str, operation: str) -> int:
  """Bytes of a collective's result.

  A started gather or permutation also names its operand; the result is the
  largest.
  """
  sizes = [
    math.prod(int(n) for n in extent.split(",") if n) * _item_bits(kind) // 8
    for kind, extent in _SHAPE.findall(shape)
  ]
  if operation in ("all-gather-start", "collective-permute-start"):
    return max(sizes)
  return sum(sizes)


def _item_bits(kind: str) -> int:
  if kind == "pred":
    return 8
  return int(re.search(r"\d+", kind)[0])
