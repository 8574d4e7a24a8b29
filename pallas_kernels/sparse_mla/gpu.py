"""Attention over gathered latents on Hopper tensor cores, forward.

Makes the arrays that `gpu_forward_kernel` wants and runs it: row numbers among
all keys of the batch in whole blocks, and heads in blocks of 64.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, N selected,
# Y all queries of the batch, Z all keys of the batch, D half of C

import functools
import math

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.sparse_mla import gpu_forward_kernel
from pallas_kernels.sparse_mla import gpu_gather

# Heads of a block, keys of a block.
HEADS, KEYS = gpu_tiles.ROWS, gpu_gather.ROWS
MAX_COLUMNS = gpu_tiles.MAX_COLUMNS


def forward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
  *,
  interpret=False,
):
  """Returns (out_latent_BTHC, lse_BTH); see the front for what they are.

  Raises:
    ValueError: a dtype other than bfloat16, or widths that do not fit.
  """
  check(query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR)
  shape = query_latent_BTHC.shape
  heads, latent = shape[2:]
  batch, keys = latent_BSC.shape[:2]
  rows_YN, blocks_Y = list_rows(indices_BTN, keys)
  out_YHC, lse_YH = _forward(
    fill_heads(query_latent_BTHC),
    fill_heads(query_rope_BTHR),
    latent_BSC.reshape(batch * keys, latent),
    key_rope_BSR.reshape(batch * keys, -1),
    rows_YN,
    blocks_Y,
    scale,
    interpret,
  )
  out_BTHC = out_YHC[:, :heads].reshape(shape)
  return out_BTHC, lse_YH[:, :heads].reshape(shape[:3])


def _forward(
  query_latent_YHC,
  query_rope_YHR,
  latent_ZC,
  rope_ZR,
  rows_YN,
  blocks_Y,
  scale,
  interpret,
):
  """Runs the kernel; heads are a multiple of 64, listed keys of 64."""
  num_queries, heads, latent = query_latent_YHC.shape
  rope = query_rope_YHR.shape[2]
  if interpret:
    # The interpreter knows no assembly: tiles of rows gathered before.
    fetched = jnp.maximum(rows_YN.reshape(-1), 0)
    latent_ZC, rope_ZR = latent_ZC[fetched], rope_ZR[fetched]
  copies = gpu_gather.num_tile_copies(latent, rope) if interpret else 1
  kernel = plgpu.kernel(
    functools.partial(
      gpu_forward_kernel.kernel, scale * math.log2(math.e), bool(interpret)
    ),
    out_type=(
      jax.ShapeDtypeStruct((num_queries, heads, latent), jnp.bfloat16),
      jax.ShapeDtypeStruct((num_queries, heads), jnp.float32),
    ),
    grid=(num_queries * heads // HEADS,),
    grid_names=("block",),
    num_threads=gpu_forward_kernel.GATHER + 1,
    thread_name="role",
    scratch_types=gpu_forward_kernel.buffers(latent, rope, copies),
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    kernel_name="sparse_mla_forward",
  )
  return kernel(
    query_latent_YHC,
    query_rope_YHR,
    latent_ZC,
    rope_ZR,
    rows_YN,
    blocks_Y,
  )


def list_rows(indices_BTN, num_keys):
  """Numbers the listed keys among all of the batch, in whole blocks.

  Returns:
    (rows_YN int32, padded at the end with -1; blocks_Y int32, how many blocks
    there are up to the last that lists a key).
  """
  batch, queries, selected = indices_BTN.shape
  first_B = num_keys * jnp.arange(batch, dtype=jnp.int32)
  rows_BTN = first_B[:, None, None] + indices_BTN.astype(jnp.int32)
  rows_BTN = jnp.where(indices_BTN >= 0, rows_BTN, -1)
  padded = max(-(-selected // KEYS), 1) * KEYS
  rows_YN = jnp.pad(
    rows_BTN.reshape(batch * queries, selected),
    [(0, 0), (0, padded - selected)],
    constant_values=-1,
  )
  block_N = jnp.arange(rows_YN.shape[1], dtype=jnp.int32) // KEYS
  return rows_YN, jnp.max(jnp.where(rows_YN >= 0, block_N + 1, 0), axis=1)


def fill_heads(query_BTHX):
  """Flattens [B,T] and fills up the heads to a multiple of 64."""
  query_YHX = query_BTHX.reshape(-1, *query_BTHX.shape[2:])
  return jnp.pad(query_YHX, [(0, 0), (0, -query_YHX.shape[1] % HEADS), (0, 0)])


def check(query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR):
  """Raises ValueError for dtypes and widths that the kernels do not take."""
  latent, rope = latent_BSC.shape[2], key_rope_BSR.shape[2]
  if latent % 128 or latent > 2 * MAX_COLUMNS or rope % 64 or not rope:
    raise ValueError(
      f"{latent=} must be a multiple of 128 up to {2 * MAX_COLUMNS}, "
      f"and {rope=} one of 64"
    )
  for array in (query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR):
    if array.dtype != jnp.bfloat16:
      raise ValueError(f"{array.dtype=} must be bfloat16")
