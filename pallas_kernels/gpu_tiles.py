"""Pieces that the attention kernels for Hopper share: tiles of 64 rows.

A warpgroup multiplies 64 rows at a time, so vectors have 64 entries, one for
each row of a product, and live in registers in the layout of its rows.
"""
# R rows (64), D columns of a tile

import inspect
import math

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

ROWS = 64
# How bfloat16 lies in shared memory for tensor cores and copy engine.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Scores of hidden keys, and a floor of the maximum above them, so that
# exp2(score - maximum) is 0 for them even where a query sees nothing.
HIDDEN = -1e30
FLOOR = -5e29
# Most columns of a copy, and of one product.
MAX_COLUMNS = 256
# JAX 0.10 wants an index of a load, 0.11 warns of it, 0.12 has none.
_IDX = inspect.signature(plgpu.load).parameters.get("idx")
_WANTED = _IDX is not None and _IDX.default is inspect.Parameter.empty
_INDEX = ((),) if _WANTED else ()


def parameters():
  """Returns the compiler parameters of all kernels."""
  return plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    reduction_scratch_bytes=0,
  )


def register_shares(*shares):
  """Returns the registers of a thread of each warpgroup, checked.

  A block starts with an even split, and what one warpgroup takes another has to
  give back: a sum beyond the start waits forever.
  """
  threads = 128 * len(shares)
  start = 65536 // threads // 8 * 8
  if sum(shares) > start * len(shares) or any(x % 8 for x in shares):
    raise ValueError(f"{shares=} must be multiples of 8 and fit {start=} each")
  return shares


def smem(*shape):
  """Describes bfloat16 shared memory that tensor cores read."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)


def query_and_heads(num_heads):
  """Splits the grid's axis "block" into a query and a block of 64 heads.

  Blocks of heads of one query run side by side and find its keys in the cache.
  One axis, because the hardware counts only the last beyond 65535.
  """
  blocks, block = num_heads // ROWS, lax.axis_index("block")
  return lax.div(block, blocks), lax.rem(block, blocks)


def zeros(columns):
  """Returns a float32 tile of zeros in registers."""
  tile_RD = jnp.zeros((ROWS, columns), jnp.float32)
  return plgpu.layout_cast(tile_RD, plgpu.Layout.WGMMA)


def vector(value):
  """Returns a float32 vector of one value in registers."""
  vector_R = jnp.full((ROWS,), value, jnp.float32)
  return plgpu.layout_cast(vector_R, plgpu.Layout.WGMMA.reduce(1))


def load_rows(ref):
  """Loads 64 values, one for each row of a tile, from any memory."""
  return load(ref, plgpu.Layout.WGMMA.reduce(1))


def load_columns(ref):
  """Loads 64 values, one for each column of a tile, from any memory."""
  return load(ref, plgpu.Layout.WGMMA.reduce(0))


def load_tile(ref):
  """Loads a tile of 64 rows from shared memory."""
  return load(ref, plgpu.Layout.WGMMA)


def load(ref, layout):
  """Loads from any memory into registers of a layout."""
  return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def along_columns(vector_R, columns):
  """Repeats a vector of the rows along columns."""
  return lax.broadcast_in_dim(vector_R, (ROWS, columns), [0])


def along_rows(vector_D):
  """Repeats a vector of the columns along rows."""
  return lax.broadcast_in_dim(vector_D, (ROWS, vector_D.shape[0]), [1])


def products(pairs):
  """Sums left @ right.T over pairs of shared memory, float32 [64,D]."""

  def multiply(total):
    for left, right in pairs:
      plgpu.wgmma(total, left, right.transpose((1, 0)))
    return total[...]

  columns = pairs[0][1].shape[0]
  return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))


def transposed_products(pairs):
  """Sums left.T @ right over pairs of shared memory, float32 [64,D]."""

  def multiply(total):
    for left, right in pairs:
      plgpu.wgmma(total, left.transpose((1, 0)), right)
    return total[...]

  columns = pairs[0][1].shape[1]
  return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))


def accumulate(total_RD, left, right, *, interpret, staging=None):
  """Returns total + left @ right.

  Args:
    total_RD: float32 in registers.
    left: bfloat16 in shared memory, or in registers.
    right: bfloat16 in shared memory.
    interpret: whether the interpreter runs this. It knows neither a sum that
      starts with a value nor a left side in registers.
    staging: shared memory for `left` where that is in registers; used by the
      interpreter alone.
  """
  if not interpret:
    return pl.run_state(lambda sum_: plgpu.wgmma(sum_, left, right))(
      plgpu.ACC.init(total_RD)
    )
  if staging is not None:
    staging[...] = left
    plgpu.commit_smem()
    left = staging

  def multiply(product):
    plgpu.wgmma(product, left, right)
    return product[...]

  return total_RD + pl.run_scoped(
    multiply, plgpu.ACC(total_RD.shape, jnp.float32)
  )


def softmax_step(score_RD, top_R, sum_R):
  """Takes a tile of base-2 scores into an online softmax.

  Returns:
    (weight_RD, factor_R of what was summed before, new top_R, new sum_R).
  """
  next_top_R = jnp.maximum(top_R, jnp.max(score_RD, axis=1))
  factor_R = jnp.exp2(top_R - next_top_R)
  weight_RD = jnp.exp2(score_RD - along_columns(next_top_R, score_RD.shape[1]))
  sum_R = sum_R * factor_R + jnp.sum(weight_RD, axis=1)
  return weight_RD, factor_R, next_top_R, sum_R


def softmax_end(top_R, sum_R):
  """Returns (1 / sum_R, lse_R); 1 and -inf where nothing was seen."""
  # NaN scores must stay NaN: only an exact zero means that nothing is seen.
  empty_R = sum_R == 0.0
  safe_R = jnp.where(empty_R, 1.0, sum_R)
  lse_R = jnp.where(empty_R, -jnp.inf, top_R * math.log(2) + jnp.log(safe_R))
  return 1.0 / safe_R, lse_R


def store(tile_RD, target, destination):
  """Rounds a tile to bfloat16 and copies it out by way of shared memory."""
  target[...] = tile_RD.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(target, destination)
  plgpu.wait_smem_to_gmem(0)


def await_last(count, slots, *barriers):
  """Waits for the last arrivals, so that barriers end in a known phase."""

  @pl.loop(jnp.maximum(count - slots, 0), count)
  def _(i):
    for barrier in barriers:
      plgpu.barrier_wait(barrier.at[lax.rem(i, slots)])
