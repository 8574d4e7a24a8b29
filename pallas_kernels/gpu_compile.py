"""Compiles for an NVIDIA GPU with no GPU at hand, and reads what came out.

XLA and Mosaic GPU compile for a described device down to machine code, once the
CUDA plugin of JAX and NVIDIA's `nvcc` and `nvdisasm` packages are installed.
What a Mosaic kernel becomes (registers, spills, instructions, shared memory)
is a fact of the compiler, so tests can hold it without a device.
"""

import contextlib
import dataclasses
import os
import pathlib
import re

import jax
from jax.experimental import topologies

# What XLA asks of a device that it does not see.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{
    major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
  }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_TARGETS = {
  "h100": dict(name="NVIDIA H100", bandwidth=3352000000000, memory=85014544384),
  "h200": dict(
    name="NVIDIA H200", bandwidth=4800000000000, memory=151397597184
  ),
}
# Where the compiler of Mosaic kernels writes what it makes; it looks at the
# variables of the process before each program.
_DUMP = "MOSAIC_GPU_DUMP_TO"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """What one Mosaic kernel became.

  Attributes:
    name: what the program calls it, or JAX, if it updates arrays in place.
    sass: the machine code as text.
    registers: registers of a thread at launch.
    spill_bytes: bytes of registers stored to memory, a thread.
    shared_bytes: bytes of shared memory, a block.
    warnings: lines in which the assembler advises or warns.
  """

  name: str
  sass: str
  registers: int
  spill_bytes: int
  shared_bytes: int
  warnings: tuple[str, ...]

  def opcodes(self):
    """Counts the instructions by name, without their modifiers."""
    counts = {}
    for name in re.findall(_INSTRUCTION, self.sass):
      counts[name] = counts.get(name, 0) + 1
    return counts

  def register_shares(self):
    """Returns the registers that warpgroups ask for, in order of the code."""
    found = re.findall(
      r"USETMAXREG\S*\s+(?:UP\w+,\s*)?0x([0-9a-f]+)", self.sass
    )
    return [int(share, 16) for share in found]

  def highest_register(self):
    """Returns the highest register used, whatever the launch value is."""
    return max(
      (int(n) for n in re.findall(r"\bR(\d+)\b", self.sass)), default=0
    )


# An instruction follows the address /*0a10*/ and perhaps a predicate @!P0.
_INSTRUCTION = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"


def compile_for(function, *arguments, target, folder):
  """Compiles function(*arguments) for a GPU that need not be there.

  Args:
    function: what to compile; it is jitted.
    arguments: arrays or `jax.ShapeDtypeStruct`s, of which only the types count.
    target: "h100" or "h200".
    folder: an empty or new folder for the compiler's files.

  Returns:
    (compiled, kernels): the `jax.stages.Compiled` and a list of `Kernel`, one
    for each Mosaic kernel in the program.

  Raises:
    ValueError: an unknown target, or a folder that is not empty.
  """
  if target not in _TARGETS:
    raise ValueError(f"{target=} is not one of {list(_TARGETS)}")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.iterdir()):
    raise ValueError(f"{folder=} is not empty")
  device = topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=_DESCRIPTION.format(**_TARGETS[target]),
    topology="1x1x1",
  ).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    arguments,
  )
  with _dumping(folder):
    compiled = jax.jit(function).lower(*arguments).compile()
  return compiled, [_read(path) for path in sorted(folder.glob("*.ptxas"))]


@contextlib.contextmanager
def _dumping(folder):
  """Has kernels dumped into the folder, and compiled rather than remembered."""
  remembers = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  os.putenv(_DUMP, str(folder))
  try:
    yield
  finally:
    os.unsetenv(_DUMP)
    jax.config.update("jax_enable_compilation_cache", remembers)


def _read(path):
  """Reads the files that the compiler left beside `path`, name.ptxas."""
  report = path.read_text()
  lines = report.splitlines()
  launch = path.with_suffix(".mlir-passes.log").read_text()
  return Kernel(
    # Without the number of the kernel in its process.
    name=path.stem.rpartition("_")[0],
    sass=path.with_suffix(".sass_ctrl").read_text(),
    registers=_largest(r"Used (\d+) registers", report),
    spill_bytes=_largest(r"(\d+) bytes spill", report),
    shared_bytes=_largest(r"shared_memory_size %c(\d+)_i32", launch),
    warnings=tuple(
      line for line in lines if re.search(r"warning|advisory|C7\d{3}", line)
    ),
  )


def _largest(pattern, text):
  return max((int(n) for n in re.findall(pattern, text)), default=0)
