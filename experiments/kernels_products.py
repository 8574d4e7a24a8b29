"""Compares ways to multiply rows by experts' matrices, compiled for a TPU.

python -m experiments.kernels_products --platform=tpu:v5p:2x2x1 --workdir=DIR

No TPU is needed: each way is compiled in a process of its own, which dumps the
compiler's schedule. A JSON line a way, on stdout and in DIR/kernels.jsonl: the
bundles of all steps of its kernel, over the fewest that the products take. A
tile that two experts share is visited twice, so that `experts` - 1 tiles of
rows come on top; what a kernel does in two forms counts as their mean. Of a way
that XLA makes no kernel of, the cycles that XLA estimates count.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app
from absl import flags
import jax
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
import jax.numpy as jnp

from experiments import kernels
from experiments import kernels_compile
from pallas_kernels import roofline
from pallas_kernels import schedule
from pallas_kernels.expert_ffn import tpu

# Rows of a device, its experts, and a matrix of an expert.
ROWS, EXPERTS, WIDTH, HIDDEN = 32768, 16, 7168, 2048
_TILE = (512, 1024, 1024)
_SCALED = 128


def _ragged(rows, matrices, sizes):
  return lax.ragged_dot(
    rows, matrices, sizes, preferred_element_type=jnp.float32
  )


def _ragged_gradient(rows, d_out, sizes):
  """The gradient by the matrices, whose values do not matter."""
  zeros = jnp.zeros((EXPERTS, WIDTH, HIDDEN), rows.dtype)
  _, pull_back = jax.vjp(lambda m: _ragged(rows, m, sizes), zeros)
  return pull_back(d_out.astype(jnp.float32))


def _megablox_gradient(rows, d_out, sizes):
  return tgmm(rows.T, d_out, sizes, tiling=tpu.TILE)


def _types(dtype, *shapes):
  return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]


_FORWARD = _types("bfloat16", (ROWS, WIDTH), (EXPERTS, WIDTH, HIDDEN))
_BACKWARD = _types("bfloat16", (ROWS, WIDTH), (ROWS, HIDDEN))
_SIZES = _types("int32", (EXPERTS,))
# By what is computed and how: the function, and the types of its arguments.
WAYS = {
  ("rows", "ragged_dot"): (_ragged, _FORWARD + _SIZES),
  ("rows", "megablox gmm"): (
    functools.partial(gmm, tiling=_TILE),
    _FORWARD + _SIZES,
  ),
  ("matrices' gradient", "ragged_dot"): (_ragged_gradient, _BACKWARD + _SIZES),
  ("matrices' gradient", "megablox tgmm"): (
    _megablox_gradient,
    _BACKWARD + _SIZES,
  ),
  ("rows in blocks of 8 bits", "jax.nn.scaled_matmul"): (
    jax.nn.scaled_matmul,
    _types("float8_e4m3fn", (1, ROWS, WIDTH), (1, HIDDEN, WIDTH))
    + _types(
      "float32", (1, ROWS, WIDTH // _SCALED), (1, HIDDEN, WIDTH // _SCALED)
    ),
  ),
}


def compile_way(number: int, topology: str, folder: str) -> dict:
  """Compiles a way, by its place among `WAYS`, and returns what it takes."""
  function, types = list(WAYS.values())[number]
  sharding = jax.sharding.SingleDeviceSharding(
    kernels_compile.tpu_device(topology)
  )
  arrays = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in types
  ]
  try:
    compiled = jax.jit(function).lower(*arrays).compile()
  except RuntimeError as error:
    # No rule to translate a primitive, or what the compiler refuses.
    return {"failed": f"does not compile: {str(error).splitlines()[0]}"}
  text = compiled.as_text()
  per_bundle, _ = roofline.MXU[topology.split(":")[0].removeprefix("tpu")]
  least = ROWS * WIDTH * HIDDEN / per_bundle
  found = [
    kernel
    for kernel in schedule.read_folder(pathlib.Path(folder))
    if any(loop.least for _, loop in kernel.every_loop())
  ]
  if found:
    (kernel,) = found
    tile = _tile(text, list(WAYS)[number])
    bundles = _bundles(kernel, tile, per_bundle)
  else:
    tile = None
    bundles = max(map(int, re.findall(r'estimated_cycles":"(\d+)"', text)))
  return {
    "tile": tile,
    "bundles": bundles,
    "minimum": least,
    "ratio": bundles / least,
    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def _tile(text, way):
  """Returns rows, contraction and width of a tile, of the gradient's too."""
  chosen = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', text)
  if chosen:
    return list(map(int, chosen.groups()))
  return list(tpu.TILE if way[0] == "matrices' gradient" else _TILE)


def _bundles(kernel, tile, per_bundle) -> float:
  """Returns the bundles of all steps; at least those of their products."""
  rows, contraction, width = tile
  least = rows * contraction * width / per_bundle
  (loop,) = (x for x in kernel.loops if x.least)
  forms = max(1, round(loop.least / least))
  steps = ROWS // rows + EXPERTS - 1
  steps *= WIDTH // contraction * (HIDDEN // width)
  return steps * max(loop.step / forms, least)


def main(argv) -> None:
  """Compiles all ways; code 1 if one breaks in another way than is known."""
  del argv
  kind, _, topology = flags.FLAGS.platform.partition(":")
  if kind != "tpu" or not topology:
    kernels.fail(
      f"--platform={flags.FLAGS.platform} must be tpu: and a topology"
    )
  failed = False
  for number, (product, way) in enumerate(WAYS):
    with tempfile.TemporaryDirectory() as folder:
      program = [sys.executable, "-m", "experiments.kernels_products", "--way"]
      done = subprocess.run(
        [*program, str(number), topology, folder],
        check=False,
        capture_output=True,
        text=True,
        cwd=kernels.ROOT,
        env=kernels.dumping(folder),
      )
    found = {"mode": "product", "product": product, "way": way}
    found |= {"topology": topology, "experts": EXPERTS}
    failed |= done.returncode != 0
    if done.returncode:
      lines = done.stderr.strip().splitlines()
      found["failed"] = lines[-1] if lines else f"code {done.returncode}"
    else:
      found |= json.loads(done.stdout.splitlines()[-1])
    kernels.emit(found)
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--way"]:
    print(json.dumps(compile_way(int(sys.argv[2]), *sys.argv[3:])))
  else:
    app.run(main, flags_parser=kernels.parse)
