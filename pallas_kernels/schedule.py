"""Reads the static schedule that the TPU compiler dumps of a kernel.

libtpu, told `--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true`, writes for each
kernel `*-final_bundles.txt`, one VLIW bundle after another, and
`*-final_hlo-static-per-bundle-utilization.txt`, how many slots of each kind a
bundle fills. A TensorCore issues a bundle a cycle at best, so bundles are a
lower bound of cycles: stalls and waits for copies come on top.

A loop is a backward branch and what lies between: from the bundle in which the
branch's target region starts to the branch's last delay slot. Its trips are
known where it counts by a constant up to a constant. Regions that a predicate
may skip count as if they ran.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import re

# Slots of the utilization file that a report shows, by its own names.
SHOWN = ("MXU", "VALU", "VLOAD", "VSTORE", "VLOAD:FILL", "VSTORE:SPILL")
BUNDLES_A_MATMUL = 4
# A branch takes effect after so many bundles at most: 4 on v5e, v5p and v6e, 6
# on 7x.
_MOST_DELAY_SLOTS = 6

_BUNDLE = re.compile(
  r"^ *(0x[0-9a-f]+|0) +([A-Z]{2}(?:, *[A-Z]{2})*)?:( >*)", re.MULTILINE
)
_BRANCH = re.compile(r"sbr\.rel \((!?)(%p\w+)\) target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_MATMUL = re.compile(r"\bvmatmul\.(?:mubr\.)?bf16\b")
# The start of a copy; the waits for its end are dma.done.
_COPY = re.compile(r"(?:\{|;;)\s+%\w+ = dma\.(?!done)")
_KERNEL = re.compile(r"exit bundle: %(\S+) = ")


@dataclasses.dataclass(frozen=True)
class Bundle:
  """One bundle: its label ("LB" heads a loop), loop depth and text."""

  label: str
  depth: int
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """A loop of a kernel.

  Attributes:
    start: its first bundle.
    stop: the bundle after its last.
    trips: how often it runs; None if that is not a constant.
    inner: the loops directly inside.
    shares: by slot, how much of its slots the loop's own bundles and those of
      inner loops fill, each bundle counted once.
    matmuls: bfloat16 products of a register of 16 rows by a loaded matrix, in
      the code, inner loops once.
    copies: copies between memories that the code starts, inner loops once.
  """

  start: int
  stop: int
  trips: int | None
  inner: tuple["Loop", ...]
  shares: dict[str, float]
  matmuls: int
  copies: int

  @property
  def bundles(self) -> int:
    """Bundles of the code, inner loops once."""
    return self.stop - self.start

  @property
  def step(self) -> int | None:
    """Bundles that one trip executes; None if inner trips are unknown."""
    return _executed(self.inner, lambda x: x.bundles, self.bundles)

  @property
  def step_matmuls(self) -> int | None:
    """Products that one trip executes; None if inner trips are unknown."""
    return _executed(self.inner, lambda x: x.matmuls, self.matmuls)

  @property
  def least(self) -> int | None:
    """Bundles of a trip that its products alone take, padding included.

    Four a product on all generations: 16 rows, one a bundle in each of four
    matrix units (v5e, v5p) or two in each of two (v6e, 7x).
    """
    count = self.step_matmuls
    return None if count is None else BUNDLES_A_MATMUL * count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """The schedule of a kernel: its bundles, and its outermost loops."""

  name: str
  bundles: int
  loops: tuple[Loop, ...]

  @property
  def executed(self) -> int | None:
    """Bundles of one call; None if a trip count is unknown."""
    return _executed(self.loops, lambda x: x.bundles, self.bundles)

  @property
  def tile(self) -> int:
    """Bundles of a trip of the largest outermost loop, a tile of the kernel.

    Where an inner loop's trips are unknown it counts once; a kernel without a
    loop is one tile.
    """
    sizes = [loop.step or loop.bundles for loop in self.loops]
    return max(sizes, default=self.bundles)

  def every_loop(self) -> Iterator[tuple[int, Loop]]:
    """Yields (depth, loop), each loop before those inside it."""
    waiting = [(0, loop) for loop in reversed(self.loops)]
    while waiting:
      depth, loop = waiting.pop()
      yield depth, loop
      waiting += [(depth + 1, inner) for inner in reversed(loop.inner)]


def _executed(
  loops: tuple[Loop, ...], size: Callable[[Loop], int], total: int
) -> int | None:
  """Adds to a total, in which inner loops are once, their other trips."""
  for loop in loops:
    of_a_trip = _executed(loop.inner, size, size(loop))
    if loop.trips is None or of_a_trip is None:
      return None
    total += loop.trips * of_a_trip - size(loop)
  return total


def read_folder(folder: pathlib.Path) -> list[Kernel]:
  """Reads the kernels that a dump folder holds, XLA's own programs left out.

  A file that was dumped twice, as by two compilations, counts twice.

  Raises:
    ValueError: a schedule without the utilization that belongs to it.
  """
  kernels = []
  for path in sorted(folder.glob("*-final_bundles.txt")):
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _KERNEL.search(text)
    stem = re.match(r"(\d+-.+?)-\d+-final_bundles\.txt$", path.name)
    if found is None or stem is None or "schedule-analysis" in path.name:
      continue
    if not _is_custom_call(text):
      continue
    pattern = f"{stem[1]}-*-final_hlo-static-per-bundle-utilization.txt"
    beside = sorted(folder.glob(pattern))
    if not beside:
      raise ValueError(f"{folder} has no {pattern}")
    kernels.append(read(found[1], text, beside[0].read_text(encoding="utf-8")))
  return kernels


def _is_custom_call(text: str) -> bool:
  return re.search(r"exit bundle: %\S+ = custom-call\(", text) is not None


def read(name: str, bundles_text: str, utilization_text: str) -> Kernel:
  """Reads one kernel from the text of its two files.

  Raises:
    ValueError: if their bundles differ in number.
  """
  bundles = parse_bundles(bundles_text)
  capacity, rows = parse_utilization(utilization_text)
  if len(rows) != len(bundles):
    raise ValueError(
      f"{name}: {len(bundles)} bundles but {len(rows)} rows of utilization"
    )
  spans = find_loops(bundles)
  return Kernel(
    name=name,
    bundles=len(bundles),
    loops=_nest(spans, 0, len(bundles), capacity, rows, bundles),
  )


def parse_bundles(text: str) -> list[Bundle]:
  """Splits the text of a schedule into bundles; a comment may span lines."""
  heads = list(_BUNDLE.finditer(text))
  ends = [head.start() for head in heads[1:]] + [len(text)]
  return [
    Bundle(head[2] or "", head[3].count(">"), text[head.end() : end].strip())
    for head, end in zip(heads, ends)
  ]


def parse_utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
  """Returns the slots a bundle has, by name, and those that each one fills."""
  lines = text.splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith("MXU"))
  names = [name.strip() for name in lines[at].split(",")]
  capacity = dict(zip(names, map(int, lines[at + 1].split()), strict=True))
  rows = [list(map(int, line.split())) for line in lines[at + 3 :] if line]
  return capacity, rows


def find_loops(bundles: list[Bundle]) -> list[tuple[int, int, int | None]]:
  """Returns (start, stop, trips) of each loop, in the order of the starts."""
  starts: dict[str, int] = {}
  for address, bundle in enumerate(bundles):
    for region in _REGION.findall(bundle.text):
      starts[region] = address
  definitions = _definitions(bundles)
  found = {}
  for address, bundle in enumerate(bundles):
    for negated, predicate, region in _BRANCH.findall(bundle.text):
      start = starts.get(region)
      if start is not None and start <= address:
        trips = _trips(definitions, predicate) if negated else None
        stop = _after_delay_slots(bundles, address)
        if start not in found or found[start][0] < stop:
          found[start] = (stop, trips)
  return [(start, *found[start]) for start in sorted(found)]


def _after_delay_slots(bundles, branch: int) -> int:
  """Returns the first bundle after the loop that a backward branch closes.

  Empty bundles bear no mark of the loop's depth; the first other one after the
  delay slots is outside.
  """
  stop = branch + 1
  last = min(len(bundles), stop + _MOST_DELAY_SLOTS)
  while stop < last and not bundles[stop].label:
    inside = bundles[stop].depth >= bundles[branch].depth
    if not inside and not bundles[stop].text.startswith("{}"):
      break
    stop += 1
  return stop


def _definitions(bundles) -> dict[str, str]:
  """Returns the right side of each scalar or predicate assignment."""
  found = {}
  for bundle in bundles:
    for name, value in re.findall(r"(%[sp]\w+) = ([^;}]+)", bundle.text):
      found.setdefault(name, value)
  return found


def _trips(definitions: dict[str, str], predicate: str) -> int | None:
  """Returns the trips of a loop that goes on until `predicate` holds."""
  test = (
    re.match(
      r"scmp\.ge\.s32\.totalorder (%s\w+), (\d+) ", definitions[predicate] + " "
    )
    if predicate in definitions
    else None
  )
  if test is None:
    return None
  step = re.match(r"sadd\.s32 (\d+), (%s\w+)", definitions.get(test[1], ""))
  if step is None:
    return None
  phi = re.match(r"sphi (%s\w+), %s\w+", definitions.get(step[2], ""))
  initial = (
    re.match(r"smov (?:\(!?%p\w+\), )?(\d+)", definitions.get(phi[1], ""))
    if phi
    else None
  )
  if initial is None:
    return None
  return max(1, -(-(int(test[2]) - int(initial[1])) // int(step[1])))


def _nest(spans, start, stop, capacity, rows, bundles) -> tuple[Loop, ...]:
  """Makes loops of the spans within [start, stop), each with those inside."""
  loops = []
  position = start
  for first, last, trips in spans:
    if first < position or last > stop:
      continue
    texts = [bundle.text for bundle in bundles[first:last]]
    inside = [s for s in spans if s[0] > first and s[1] <= last]
    loops.append(
      Loop(
        start=first,
        stop=last,
        trips=trips,
        inner=_nest(inside, first, last, capacity, rows, bundles),
        shares=_shares(capacity, rows[first:last]),
        matmuls=sum(len(_MATMUL.findall(text)) for text in texts),
        copies=sum(len(_COPY.findall(text)) for text in texts),
      )
    )
    position = last
  return tuple(loops)


def _shares(capacity, rows) -> dict[str, float]:
  totals = [sum(column) for column in zip(*rows)]
  return {
    name: total / (len(rows) * slots)
    for (name, slots), total in zip(capacity.items(), totals)
    if name in SHOWN
  }
