"""Fetches listed rows of a cache into swizzled shared memory.

Hopper's copy engine cannot gather, so the 128 threads of a warpgroup copy 16
bytes each by `cp.async`: 8 threads take a row's 128-byte pieces in turn, 16
rows at a time. The destination is what a tiled and swizzled TMA copy of 64 rows
would write (`offset`), so that the tensor cores read it as they would that.
The compiler's Python interface has no such copy; it is written as assembly.
"""
# N listed keys of a block; R rows and D columns of a tile; Z rows of width X

# The dialect of the assembly has no public name in JAX.
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax._src.lib.mlir.dialects import llvm
from jax._src.lib.mlir.dialects import vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gpu_tiles

# Keys of a block; bytes of a piece of a row, of a thread's copy; threads.
ROWS, PIECE, COPY, THREADS = 64, 128, 16, 128
# bfloat16 values of a piece.
COLUMNS = PIECE // 2
# Threads of a row, and rows that are copied at a time.
LANES = PIECE // COPY
PASS = THREADS // LANES
PASSES = ROWS // PASS
_ROWS_LAYOUT = plgpu.Layout.WG_STRIDED((PASSES * THREADS,), vec_size=PASSES)


def offset(row, piece, lane, num_pieces):
  """Returns the byte where 16 bytes of a row belong in shared memory.

  Tiles of 8 rows and 128 bytes lie one after the other, and inside one the
  place of 16 bytes in a row is XORed with the row.
  """
  tile = (row >> 3) * num_pieces + piece
  return tile * 1024 + (row & 7) * PIECE + ((lane ^ (row & 7)) << 4)


def load_rows(rows, entry):
  """Loads the 64 row numbers of a block, for `start`; -1 as the first row.

  Ahead of time, for the copies wait for them. Each thread gets the four that it
  copies, so the result is int32 [512] with repetitions.

  Args:
    rows: int32 row numbers in global memory; -1 is padding.
    entry: the block's first entry in `rows`, counted through its axes.
  """

  def emit(_, rows, entry):
    numbers = _emit_rows(rows, entry)
    return mgpu.FragmentedArray(
      _registers=np.array([numbers], dtype=object),
      _layout=mgpu.WGStridedFragLayout((PASSES * THREADS,), PASSES),
      _is_signed=True,
    )

  return plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(
      (PASSES * THREADS,), jnp.int32, layout=_ROWS_LAYOUT
    ),
  )(emit)(rows, jnp.int32(entry))


def start(sources, row_numbers, slot):
  """Begins to copy the rows of one block, side by side, into a slot.

  Args:
    sources: bfloat16 arrays in global memory, such as [latents, rotated keys],
      whose widths are multiples of 64.
    row_numbers: what `load_rows` returned.
    slot: shared memory [64, sum of widths] with `gpu_tiles.SWIZZLED`.
  """
  widths = [source.shape[-1] // COLUMNS for source in sources]

  def emit(_, *arguments):
    *sources, row_numbers, slot = arguments
    _emit_copies(sources, widths, row_numbers, slot)

  types = [plgpu.RefType()] * len(sources)
  types += [_ROWS_LAYOUT, plgpu.RefType(gpu_tiles.SWIZZLED)]
  plgpu.inline_mgpu(arg_types=tuple(types))(emit)(*sources, row_numbers, slot)


def finish():
  """Waits for this thread's copies, and makes them seen by tensor cores."""

  def emit(_):
    # The tensor cores read through another path than these copies write.
    _assembly(
      ir.Type.parse("!llvm.void"),
      [],
      "cp.async.commit_group; cp.async.wait_group 0; "
      "fence.proxy.async.shared::cta;",
      "~{memory}",
    )

  plgpu.inline_mgpu()(emit)()


def add_tile(tile_RD, target_ZX, rows, entry, column):
  """Adds 64 rows of a product to the listed rows of global memory, atomically.

  A lane of a product holds two columns of two rows. Neighbours trade, so that
  an even lane adds four columns of the first row, and an odd one of the second.

  Args:
    tile_RD: float32 [64, D] in registers, as a product leaves them.
    target_ZX: float32 in global memory, X a multiple of 4.
    rows: int32 row numbers in global memory; nothing is added for -1.
    entry: the first of 64 entries in `rows`, counted through its axes.
    column: the first of D columns, a multiple of 4.
  """
  width = target_ZX.shape[-1]

  def emit(_, tile_RD, target_ZX, rows, entry, column):
    _emit_sums(tile_RD, target_ZX, width, column, rows, entry)

  plgpu.inline_mgpu(
    arg_types=(
      plgpu.Layout.WGMMA,
      plgpu.RefType(),
      plgpu.RefType(),
      plgpu.Layout.WG_SPLAT,
      plgpu.Layout.WG_SPLAT,
    )
  )(emit)(tile_RD, target_ZX, rows, jnp.int32(entry), jnp.int32(column))


def sum_place(thread):
  """Returns the row and first column of the first four sums of a thread.

  The others follow at every 8th column. `thread` is a number of any kind.
  """
  odd, warp, quad = thread & 1, thread >> 5, (thread & 31) >> 2
  return warp * 16 + odd * 8 + quad, (thread & 2) * 2


def fetch_tile(sources, first, slot, full):
  """Copies 64 rows that lie one after the other, where `start` would gather.

  For the interpreter, which knows no assembly.
  """
  rows, place = pl.ds(first, ROWS), 0
  for source in sources:
    for start, size in _pieces(source.shape[1]):
      plgpu.copy_gmem_to_smem(
        source.at[rows, pl.ds(start, size)],
        slot.at[:, pl.ds(place + start, size)],
        full,
      )
    place += source.shape[1]


def num_tile_copies(*widths):
  """Returns how many copies `fetch_tile` makes of sources of these widths."""
  return sum(len(_pieces(width)) for width in widths)


def _pieces(width):
  """Cuts columns into copies: (first, how many) of each."""
  most = gpu_tiles.MAX_COLUMNS
  return [(x, min(most, width - x)) for x in range(0, width, most)]


def _emit_rows(rows, entry):
  """Writes the loads of one thread: the rows that it copies, as a vector."""
  i32, i64 = _integer(32), _integer(64)
  thread = arith.andi(mgpu.thread_idx(), _number(THREADS - 1))
  first = arith.shrui(thread, _number(LANES.bit_length() - 1))
  listed = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(rows))
  place = arith.extui(i64, arith.addi(_scalar(entry), first))
  listed = arith.addi(listed, arith.muli(place, _number(4, i64)))
  numbers = []
  for step in range(PASSES):
    address = arith.addi(listed, _number(4 * PASS * step, i64))
    row = _assembly(i32, [address], "ld.global.nc.b32 $0, [$1];", "=r,l")
    numbers.append(arith.maxsi(row, _number(0)))
  return vector.from_elements(ir.VectorType.get((PASSES,), i32), numbers)


def _emit_copies(sources, widths, row_numbers, slot):
  """Writes the copies of one thread."""
  i32, i64 = _integer(32), _integer(64)
  thread = arith.andi(mgpu.thread_idx(), _number(THREADS - 1))
  lane = arith.andi(thread, _number(LANES - 1))
  first = arith.shrui(thread, _number(LANES.bit_length() - 1))
  to = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(slot))
  # Rows 16 apart have the same place in their tiles: one XOR serves all.
  in_tile = arith.andi(first, _number(7))
  swizzled = arith.shli(arith.xori(lane, in_tile), _number(4))
  to = arith.addi(to, swizzled)
  to = arith.addi(to, arith.muli(in_tile, _number(PIECE)))
  tile_row = arith.shrui(first, _number(3))
  tile_bytes = offset(8, 0, 0, sum(widths))
  to = arith.addi(to, arith.muli(tile_row, _number(tile_bytes)))
  lane_bytes = arith.extui(i64, arith.shli(lane, _number(4)))
  bases = [
    arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(source)), lane_bytes)
    for source in sources
  ]
  (numbers,) = row_numbers.registers.flat
  for step in range(PASSES):
    row = llvm.extractelement(numbers, _number(step))
    row, piece = arith.extui(i64, row), 0
    for base, width in zip(bases, widths, strict=True):
      source = arith.muli(row, _number(width * PIECE, i64))
      source = arith.addi(base, source)
      for i in range(width):
        _copy(
          arith.addi(to, _number(offset(step * PASS, piece, 0, sum(widths)))),
          arith.addi(source, _number(i * PIECE, i64)),
        )
        piece += 1


def _emit_sums(tile_RD, target_ZX, width, column, rows, entry):
  """Writes the additions of one thread; see `add_tile` and `sum_place`."""
  i1, i32, i64 = _integer(1), _integer(32), _integer(64)
  f32 = ir.F32Type.get()
  entry, column = _scalar(entry), _scalar(column)
  thread = arith.andi(mgpu.thread_idx(), _number(THREADS - 1))
  odd = arith.andi(thread, _number(1))
  row = arith.muli(arith.shrui(thread, _number(5)), _number(16))
  row = arith.addi(row, arith.muli(odd, _number(8)))
  quad = arith.shrui(arith.andi(thread, _number(31)), _number(2))
  row = arith.addi(row, quad)
  first = arith.muli(arith.andi(thread, _number(2)), _number(2))
  listed = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(rows))
  place = arith.extui(i64, arith.addi(entry, row))
  listed = arith.addi(listed, arith.muli(place, _number(4, i64)))
  row = _assembly(i32, [listed], "ld.global.nc.b32 $0, [$1];", "=r,l")
  to = arith.muli(arith.extsi(i64, row), _number(4 * width, i64))
  to = arith.addi(to, llvm.ptrtoint(i64, mgpu.utils.memref_ptr(target_ZX)))
  first = arith.addi(first, column)
  to = arith.addi(to, arith.muli(arith.extui(i64, first), _number(4, i64)))
  is_odd = arith.trunci(i1, odd)
  # Registers: [columns / 8, rows 8 apart] of pairs of columns.
  pairs = tile_RD.registers.reshape(-1, 2)
  for i, (upper, lower) in enumerate(pairs):
    values = []
    for j in range(2):
      one, other = (llvm.extractelement(x, _number(j)) for x in (upper, lower))
      values.append((one, other))
    kept = [arith.select(is_odd, y, x) for x, y in values]
    given = [arith.select(is_odd, x, y) for x, y in values]
    taken = [mgpu.utils.shfl_bfly(x, 1) for x in given]
    taken = [x if x.type == f32 else arith.bitcast(f32, x) for x in taken]
    left = [arith.select(is_odd, y, x) for x, y in zip(kept, taken)]
    right = [arith.select(is_odd, x, y) for x, y in zip(kept, taken)]
    _assembly(
      ir.Type.parse("!llvm.void"),
      [arith.addi(to, _number(32 * i, i64)), *left, *right, row],
      "{ .reg .pred p; setp.ge.s32 p, $5, 0;"
      " @p red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4}; }",
      "l,f,f,f,f,r",
    )


def _integer(bits):
  return ir.IntegerType.get_signless(bits)


def _number(value, type_=None):
  type_ = _integer(32) if type_ is None else type_
  return arith.constant(type_, ir.IntegerAttr.get(type_, value))


def _scalar(value):
  """Returns a number that one way of lowering passes as an array."""
  return value.registers.item() if hasattr(value, "registers") else value


def _copy(to, source):
  _assembly(
    ir.Type.parse("!llvm.void"),
    [to, source],
    "cp.async.cg.shared.global.L2::256B [$0], [$1], 16;",
    "r,l",
  )


def _assembly(result, operands, text, constraints):
  return llvm.inline_asm(
    result, operands, text, constraints, has_side_effects=True
  )
