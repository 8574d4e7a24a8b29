"""The least work of each operation, and what devices can do in a second.

Floating-point operations and bytes are functions of a case's sizes alone. A
product counts two operations. Bytes are those of arguments and results, each
moved once: what no implementation can go below.
"""

import dataclasses
import math
from typing import NamedTuple

import jax

from pallas_kernels import cases
from pallas_kernels import problems


class Work(NamedTuple):
  """What one call has to do: operations of matrix products, and bytes."""

  flops: int
  bytes: int


class Product(NamedTuple):
  """Matrix products of one form: `rows` rows of `contraction` by `width`."""

  rows: float
  contraction: int
  width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """Peaks of one JAX device.

  Attributes:
    name: short name.
    kinds: what `jax.Device.device_kind` starts with there.
    flops: peak operations a second of matrix products, by input type.
    bytes: peak bytes a second of the main memory; None if unknown.
    source: where the figures are from.
  """

  name: str
  kinds: tuple[str, ...] = ()
  flops: dict[str, float]
  bytes: float | None
  source: str


_HOPPER = {
  "float32": 67e12,
  "bfloat16": 989e12,
  "float8_e4m3fn": 1979e12,
}
# float32 on TPU takes several passes of bfloat16; no peak is published.
DEVICES = (
  Device(
    name="h200",
    kinds=("NVIDIA H200", "NVIDIA GH200 144G"),
    flops=_HOPPER,
    bytes=4.8e12,
    source="NVIDIA H200 datasheet, SXM, dense",
  ),
  Device(
    name="h100",
    kinds=("NVIDIA H100",),
    flops=_HOPPER,
    bytes=3.35e12,
    source="NVIDIA H100 datasheet, SXM, dense",
  ),
  Device(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    flops={"bfloat16": 197e12, "float8_e4m3fn": 197e12},
    bytes=0.819e12,
    source="cloud.google.com/tpu/docs/v5e; 8-bit floats run as bfloat16",
  ),
  Device(
    name="v5p",
    kinds=("TPU v5p", "TPU v5"),
    flops={"bfloat16": 459e12, "float8_e4m3fn": 459e12},
    bytes=2.765e12,
    source="cloud.google.com/tpu/docs/v5p; both cores of the chip",
  ),
  Device(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    flops={"bfloat16": 918e12, "float8_e4m3fn": 918e12},
    bytes=1.64e12,
    source="cloud.google.com/tpu/docs/v6e; 8-bit floats run as bfloat16",
  ),
  Device(
    name="7x",
    kinds=("TPU7x", "TPU v7x", "TPU v7"),
    flops={"bfloat16": 1153.5e12, "float8_e4m3fn": 2307e12},
    bytes=3.69e12,
    source="cloud.google.com/tpu/docs/tpu7x; half a chip, which is one device",
  ),
)

# Multiply-adds a bundle of one TensorCore, and the side of its matrix unit: a
# shorter contraction or output width is padded to a multiple of it.
MXU = {
  "v5e": (4 * 128 * 128, 128),
  "v5p": (4 * 128 * 128, 128),
  "v6e": (4 * 256 * 256, 256),
  "7x": (4 * 256 * 256, 256),
}
DIRECTIONS = ("forward", "forward_backward")


def device(kind: str) -> Device | None:
  """Finds a device by its short name or by JAX's `device_kind`."""
  for found in DEVICES:
    if kind == found.name or kind.startswith(found.kinds):
      return found
  return None


def pairs(case: cases.Case, every_pair: bool = False) -> int:
  """Counts pairs of a query and a key it sees or lists, over all sequences.

  Queries are the last of a causal sequence: query t of T over S keys sees
  S - T + t + 1. A list holds at most `top_k` of them. A masked operation counts
  every visible pair, as it has to look at them; with `every_pair`, the hidden
  ones too.
  """
  if case.operation == "expert_ffn":
    return case.queries * case.top_k
  first = case.keys - case.queries + 1
  if case.operation in ("sparse_mla", "indexer_kl_gathered"):
    full = min(max(case.top_k - first, 0), case.queries)
    rising = full * (2 * first + full - 1) // 2
    return case.batch * (rising + (case.queries - full) * case.top_k)
  if every_pair:
    return case.batch * case.queries * case.keys
  return case.batch * case.queries * (first + case.keys) // 2


def products(
  case: cases.Case, direction: str, every_pair: bool = False
) -> list[Product]:
  """Lists the matrix products of an operation.

  With H heads, Q key width, V value width, C latent and R rotary width, I
  index heads of width K, a pair of a query and a key costs:
    index_select, decode_scores: I K.
    masked_attention: H (Q + V); backward H (3 Q + 2 V): scores again, the
      gradients of weights, values, queries and keys.
    sparse_mla: the same with Q = C + R, V = C.
    indexer_kl: H Q for the target and I K for the scores; its gradient two
      more of the latter. indexer_kl_gathered: the same with Q = C + R.
    expert_ffn: a token and expert cost 3 D F, backward twice that.

  Args:
    case: the problem.
    direction: "forward" or "forward_backward".
    every_pair: whether hidden pairs count, as they do in a static schedule.
  """
  if direction not in DIRECTIONS:
    raise ValueError(f"{direction=} is not one of {DIRECTIONS}")
  both = direction == "forward_backward"
  count = pairs(case, every_pair)
  heads, index = case.heads, (case.index_heads, case.index_width)
  key = case.width or case.latent + case.rope
  if case.operation == "expert_ffn":
    into = Product(2 * count, case.width, case.value)
    out = Product(count, case.value, case.width)
    if not both:
      return [into, out]
    return [
      into._replace(rows=3 * count),
      out._replace(rows=3 * count),
      _sums(3 * count * case.width, case.value),
    ]
  if case.operation in ("index_select", "decode_scores"):
    return [_scores(count * index[0], index[1])]
  if case.operation in ("indexer_kl", "indexer_kl_gathered"):
    found = [_scores(count * heads, key), _scores(count * index[0], index[1])]
    if both:
      found += [_sums(count * index[0], index[1])] * 2
    return found
  value = case.value or case.latent
  found = [_scores(count * heads, key), _sums(count * heads, value)]
  if both:
    found += [_scores(count * heads, key), _scores(count * heads, value)]
    found += [_sums(count * heads, value)] + [_sums(count * heads, key)] * 2
  return found


# Tiles of keys and queries are wide, so that padding concerns the head's width
# only: it is the contraction of scores, and the output width of sums.
_WIDE = 256


def _scores(count, width):
  """A dot product of `width` for each pair."""
  return Product(count / _WIDE, width, _WIDE)


def _sums(count, width):
  """A sum over keys or queries of rows of `width`, an addend a pair."""
  return Product(count / _WIDE, _WIDE, width)


def work(case: cases.Case, dtype: str, direction: str) -> Work:
  """Returns the operations and bytes of one call; see `products`, `pairs`."""
  flops = round(sum(2 * math.prod(p) for p in products(case, direction)))
  avals = problems.shapes(case, dtype)
  moved = sum(_size(aval) for aval in avals.values())
  moved += _result_bytes(case, dtype)
  if direction == "forward_backward":
    trained = problems.TRAINED[case.operation]
    moved += sum(_size(avals[name]) for name in trained)
  return Work(flops, moved)


def _size(aval: jax.ShapeDtypeStruct) -> int:
  return math.prod(aval.shape) * aval.dtype.itemsize


def _result_bytes(case, dtype):
  """Bytes of outputs; statistics of four bytes a query or head included."""
  rows = case.batch * case.queries
  if case.operation == "expert_ffn":
    return 4 * rows * case.width
  if case.operation == "decode_scores":
    return 4 * rows * case.keys
  if case.operation == "index_select":
    words = -(-case.keys // 32)
    return rows * (4 * words + 4 * case.top_k + 9)
  if case.operation in ("indexer_kl", "indexer_kl_gathered"):
    return 4 * rows
  width = case.value or case.latent
  return rows * case.heads * (width * jax.numpy.dtype(dtype).itemsize + 4)


def floor_seconds(work_done: Work, dtype: str, on: Device) -> float | None:
  """Returns the least time: of the products, or of the bytes if longer.

  None if the device's peak for this type is unknown.
  """
  if dtype not in on.flops:
    return None
  of_flops = work_done.flops / on.flops[dtype]
  of_bytes = work_done.bytes / on.bytes if on.bytes else 0.0
  return max(of_flops, of_bytes)


def mxu_bundles(
  case: cases.Case, direction: str, generation: str, padded: bool
) -> float:
  """Returns the fewest bundles of one TensorCore for all pairs' products.

  `padded` rounds contraction and output width up to the matrix unit's side.
  """
  per_bundle, side = MXU[generation]
  total = 0.0
  for rows, contraction, width in products(case, direction, every_pair=True):
    if padded:
      contraction = -(-contraction // side) * side
      width = -(-width // side) * side
    total += rows * contraction * width
  return total / per_bundle
