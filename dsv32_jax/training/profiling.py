"""Where the time of a compiled step goes, from a profile and its program.

The profile tells how long each instruction of a program ran; the program's text
tells from which line of this project an instruction comes.
"""

import collections
from collections.abc import Iterable
import json
import pathlib
import re

import jax

# Folder or file of this project, and what it does in a step. The innermost line
# that one of them matches counts.
PARTS = {
  "pallas_kernels/index_select": "selection",
  "pallas_kernels/indexer_kl": "indexer KL",
  "pallas_kernels/masked_attention": "attention",
  "pallas_kernels/sparse_mla": "attention",
  "pallas_kernels/expert_ffn": "experts",
  "dsv32_jax/model/indexer.py": "indexer projections",
  "dsv32_jax/model/selection.py": "selection",
  "dsv32_jax/model/mla.py": "attention projections",
  "dsv32_jax/model/attention.py": "attention",
  "dsv32_jax/model/forms.py": "attention",
  "dsv32_jax/model/moe.py": "experts",
  "dsv32_jax/model/expert_exchange.py": "experts",
  "dsv32_jax/model/layers.py": "norms, embedding, dense layers",
  "dsv32_jax/model/block.py": "norms, embedding, dense layers",
  "dsv32_jax/model/transformer.py": "norms, embedding, dense layers",
  "dsv32_jax/training/losses.py": "head and loss",
  "dsv32_jax/training/optimizer.py": "optimiser",
  "dsv32_jax/training/step.py": "optimiser",
}
OTHER = "other"
# Their time is that of what they call.
_CALLS = frozenset({"while", "conditional", "call"})
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(.*?$", re.MULTILINE
)
_FRAME = re.compile(r"stack_frame_id=(\d+)")


def parts_of(text: str) -> dict[str, str]:
  """Tells which part of the model each instruction of a program serves.

  Args:
    text: of the compiled program, `compiled.as_text()`.

  Returns:
    A value of PARTS, or OTHER, by name of the instruction; without those that
    only call others.
  """
  frames = _parts_of_frames(text)
  found = {}
  for match in _INSTRUCTION.finditer(text):
    name, operation = match.groups()
    if operation not in _CALLS:
      frame = _FRAME.search(match[0])
      found[name] = frames.get(int(frame[1]), OTHER) if frame else OTHER
  return found


def seconds_by_part(folder, text: str) -> dict[str, float]:
  """Adds up the time of a program's instructions, over all threads.

  Args:
    folder: of `jax.profiler.trace`; its newest profile is read.
    text: of the program that ran.

  Returns:
    Seconds by part, the largest first.

  Raises:
    FileNotFoundError: if there is no profile.
    ValueError: if it holds no instruction of the program.
  """
  profiles = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
  if not profiles:
    raise FileNotFoundError(f"{folder} holds no profile")
  module = re.search(r"^HloModule ([\w.\-]+)", text)[1]
  parts, spent = parts_of(text), collections.Counter()
  for name, seconds in _instructions(profiles[-1], module):
    if name in parts:
      spent[parts[name]] += seconds
  if not spent:
    raise ValueError(f"{profiles[-1]} holds no instruction of {module}")
  return dict(spent.most_common())


def _instructions(path, module: str) -> Iterable[tuple[str, float]]:
  """Yields (instruction, seconds) of each run of one."""
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats and stats.get("hlo_module") == module:
          yield stats["hlo_op"], event.duration_ns * 1e-9


def _parts_of_frames(text: str) -> dict[int, str]:
  """The part of each stack frame that the text lists."""
  files = dict(_listed(text, "FileNames", r'"(.*)"'))
  locations = dict(_listed(text, "FileLocations", r"\{file_name_id=(\d+) .*"))
  frames = {
    number: (location, parent)
    for number, location, parent in _listed(
      text, "StackFrames", r"\{file_location_id=(\d+) parent_frame_id=(\d+)\}"
    )
  }

  def part(number):
    while number in frames:
      location, parent = frames[number]
      name = files.get(locations.get(location), "")
      for place, what in PARTS.items():
        if f"/{place}" in name:
          return what
      # Parents are written one too high, and 1 is none.
      number = str(int(parent) - 1)
    return OTHER

  return {int(number): part(number) for number in frames}


def _listed(text: str, section: str, entry: str) -> list[tuple[str, ...]]:
  """Returns (number, what `entry` captures) of each line of a section."""
  lines = text.partition(f"\n{section}\n")[2].partition("\n\n")[0]
  return re.findall(rf"^(\d+) {entry}$", lines, re.MULTILINE)


class StepTracer:
  """Profiles some steps of a run, once everything is compiled.

  Attributes:
    folder: of the profile, which xprof and TensorBoard read.
  """

  def __init__(self, folder, first: int, last: int):
    """Profiles steps `first` to `last`, both included."""
    self.folder = pathlib.Path(folder)
    self._first, self._last = first, last

  def begin(self, step: int) -> None:
    """Call it before each step."""
    if step == self._first:
      jax.profiler.start_trace(str(self.folder))

  def end(self, step: int, results) -> bool:
    """Call it after each step; tells whether that was the last one profiled.

    Args:
      step: as given to `begin`.
      results: of the step, waited for where the profile ends.
    """
    if step == self._last:
      jax.block_until_ready(results)
      jax.profiler.stop_trace()
    return step == self._last

  def write_parts(self, text: str) -> None:
    """Writes `parts.json` beside the profile: seconds of a step by part.

    Args:
      text: of the program that ran.
    """
    steps = self._last - self._first + 1
    parts = seconds_by_part(self.folder, text)
    parts = {name: seconds / steps for name, seconds in parts.items()}
    (self.folder / "parts.json").write_text(json.dumps(parts, indent=2) + "\n")
