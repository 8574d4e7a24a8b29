"""Reads the machine code of a Hopper kernel: its loops and what is in them.

The text is nvdisasm's, as `gpu_compile` returns it: an instruction stands after
its address in /*0a10*/. Waiting for a barrier is compiled to a jump to the end
of the code and back, which is no loop; so loops are the natural ones: a branch
whose target is on every path to it, with all that gets from the target to the
branch. A warp issues an instruction a cycle at best, so the instructions of a
loop body are a lower bound of its cycles.
"""

import collections
import dataclasses
import re

_LABEL = re.compile(r"^\s*(\.L_\w+):", re.MULTILINE)
_INSTRUCTION = re.compile(
  r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^\n;]*)"
)
_TARGET = re.compile(r"`\((\.L_\w+)\)|\b0x([0-9a-f]+)\s*$")
# Registers that did not fit go to and from local memory.
SPILLS = ("LDL", "STL")
TENSOR = ("HGMMA", "QGMMA")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """A loop: the address of its head, and its instructions by opcode."""

  start: int
  opcodes: dict[str, int]

  @property
  def instructions(self) -> int:
    """Instructions of its body, inner loops and all branches once."""
    return sum(self.opcodes.values())


@dataclasses.dataclass(frozen=True)
class _Instruction:
  address: int
  opcode: str
  # Where it may jump to, and whether the next instruction may follow.
  target: int | None
  falls: bool


def loops(sass: str) -> list[Loop]:
  """Lists the loops of one kernel, the largest first.

  A branch to itself, which pads the end of a kernel, is none.
  """
  code = _parse(sass)
  blocks, following = _blocks(code)
  dominators = _dominators(following)
  bodies = collections.defaultdict(set)
  for block, successors in enumerate(following):
    for head in successors:
      if head in dominators[block] and len(blocks[block]) > (head == block):
        bodies[head] |= _body(following, block, head)
  made = [
    Loop(
      start=blocks[head][0].address,
      opcodes=dict(
        collections.Counter(i.opcode for b in body for i in blocks[b])
      ),
    )
    for head, body in bodies.items()
  ]
  return sorted(made, key=lambda loop: (-loop.instructions, loop.start))


def spill_instructions(sass: str) -> int:
  """Counts loads and stores of spilled registers."""
  return sum(i.opcode in SPILLS for i in _parse(sass))


def _parse(sass) -> list[_Instruction]:
  labels = {}
  for label in _LABEL.finditer(sass):
    following = _INSTRUCTION.search(sass, label.end())
    if following is not None:
      labels[label[1]] = int(following[1], 16)
  code = []
  for found in _INSTRUCTION.finditer(sass):
    opcode, rest = found[3], found[4].strip()
    conditional = found[2] is not None
    target = None
    if opcode == "BRA":
      match = _TARGET.search(rest)
      if match is not None:
        named = labels.get(match[1])
        target = named if match[1] else int(match[2], 16)
      # BRA.DIV and the like, and a predicate among the operands.
      conditional |= not re.match(r"(`|0x)", rest)
    ends = opcode in ("BRA", "EXIT", "RET", "BRX", "JMP")
    code.append(
      _Instruction(int(found[1], 16), opcode, target, conditional or not ends)
    )
  return code


def _blocks(code):
  """Returns the basic blocks, and for each the numbers of those after it."""
  heads = {i.target for i in code if i.target is not None}
  blocks, cut = [], True
  for instruction in code:
    if cut or instruction.address in heads:
      blocks.append([])
    blocks[-1].append(instruction)
    cut = instruction.target is not None or not instruction.falls
  number = {block[0].address: n for n, block in enumerate(blocks)}
  following = []
  for n, block in enumerate(blocks):
    last, successors = block[-1], set()
    if last.falls and n + 1 < len(blocks):
      successors.add(n + 1)
    if last.target in number:
      successors.add(number[last.target])
    following.append(successors)
  return blocks, following


def _dominators(following) -> list[set[int]]:
  """Returns for each block those on every path to it from the first.

  A block that nothing reaches has none.
  """
  everything = set(range(len(following)))
  before = collections.defaultdict(set)
  for block, successors in enumerate(following):
    for successor in successors:
      before[successor].add(block)
  reached, waiting = set(), [0] if following else []
  while waiting:
    block = waiting.pop()
    if block not in reached:
      reached.add(block)
      waiting += following[block]
  found = [set(everything) for _ in following]
  if following:
    found[0] = {0}
  changed = True
  while changed:
    changed = False
    for block in sorted(reached - {0}):
      paths = [found[b] for b in before[block] & reached]
      new = set.intersection(*paths) | {block}
      changed |= new != found[block]
      found[block] = new
  return [found[b] if b in reached else set() for b in range(len(following))]


def _body(following, block, head) -> set[int]:
  """Returns the natural loop of the back edge from `block` to `head`."""
  before = collections.defaultdict(set)
  for b, successors in enumerate(following):
    for successor in successors:
      before[successor].add(b)
  body, waiting = {head}, [block]
  while waiting:
    b = waiting.pop()
    if b not in body:
      body.add(b)
      waiting += before[b]
  return body
