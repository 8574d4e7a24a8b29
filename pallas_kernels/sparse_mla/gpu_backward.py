"""Attention over gathered latents on Hopper tensor cores, backward.

Makes the arrays that `gpu_backward_kernel` wants, runs it, and gives its sums
the dtypes of the inputs. The float32 gradient of [latent | rope] of all keys
starts as zeros; the kernel adds to it in place.
"""
# B batch, T queries, S keys, H heads, C latent width, R rope width, X their
# sum, N selected, Y all queries of the batch, Z all keys of the batch, D
# columns of a part, K keys of a block

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import gpu_tiles
from pallas_kernels.sparse_mla import gpu
from pallas_kernels.sparse_mla import gpu_backward_kernel
from pallas_kernels.sparse_mla import gpu_gather


def backward(
  query_latent_BTHC,
  query_rope_BTHR,
  latent_BSC,
  key_rope_BSR,
  indices_BTN,
  scale,
  out_BTHC,
  lse_BTH,
  d_out_BTHC,
  *,
  interpret=False,
):
  """Returns the gradients of the four arrays in their dtypes.

  Raises:
    ValueError: what `gpu.forward` refuses, or a rope width other than 64.
  """
  gpu.check(query_latent_BTHC, query_rope_BTHR, latent_BSC, key_rope_BSR)
  latent, rope = latent_BSC.shape[2], key_rope_BSR.shape[2]
  if rope != gpu_backward_kernel.PIECE:
    raise ValueError(f"{rope=} must be 64")
  batch, keys = latent_BSC.shape[:2]
  heads = query_rope_BTHR.shape[2]
  mean_BTH = jnp.sum(
    d_out_BTHC.astype(jnp.float32) * out_BTHC.astype(jnp.float32), axis=-1
  )
  # An empty list has lse -inf and no row whose weight counts.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH) * math.log2(math.e)
  inputs = gpu_backward_kernel.Inputs(
    gpu.fill_heads(query_latent_BTHC),
    gpu.fill_heads(query_rope_BTHR),
    gpu.fill_heads(d_out_BTHC.astype(jnp.bfloat16)),
    gpu.fill_heads(lse_BTH[..., None])[..., 0],
    gpu.fill_heads(mean_BTH[..., None])[..., 0],
    latent_BSC.reshape(batch * keys, latent),
    key_rope_BSR.reshape(batch * keys, rope),
    *gpu.list_rows(indices_BTN, keys),
  )
  run = _interpret if interpret else _run
  d_latent_YHC, d_rope_YHR, d_key_ZX = run(inputs, scale, interpret)
  d_key_BSX = d_key_ZX.reshape(batch, keys, -1).astype(jnp.bfloat16)
  return (
    d_latent_YHC[:, :heads].reshape(query_latent_BTHC.shape),
    d_rope_YHR[:, :heads].reshape(query_rope_BTHR.shape),
    d_key_BSX[..., :latent],
    d_key_BSX[..., latent:],
  )


def _run(inputs, scale, interpret):
  """Returns the gradients of queries, and d_key_ZX summed up in place."""
  del interpret
  scratch = gpu_backward_kernel.buffers(inputs, copies=1)

  def body(*refs):
    *arrays, sum_ZX, d_latent_YHC, d_rope_YHR = refs
    refs = (*arrays, d_latent_YHC, d_rope_YHR, sum_ZX)
    own = functools.partial(gpu_backward_kernel.kernel, scale, False, *refs)
    pl.run_scoped(own, collective_axes="role", **scratch)

  *d_queries, d_key_ZX = _outputs(inputs)
  kernel = pl.kernel(
    body,
    out_type=tuple(d_queries),
    mesh=plgpu.Mesh(**_grid(inputs)),
    compiler_params=gpu_tiles.parameters(),
    name="sparse_mla_backward",
  )
  sum_ZX = jax.new_ref(jnp.zeros(d_key_ZX.shape, d_key_ZX.dtype))
  d_queries = kernel(*inputs, sum_ZX)
  return *d_queries, jax.freeze(sum_ZX)


def _interpret(inputs, scale, interpret):
  """Returns what `_run` does; the interpreter cannot gather nor add up.

  So rows are gathered before, and their gradients leave one by one.
  """
  rows = inputs.rows_YN.reshape(-1)
  blocks = inputs.query_rope_YHR.shape[1] // gpu.HEADS
  fetched = jnp.maximum(rows, 0)
  *d_queries, d_key_ZX = _outputs(inputs)
  d_row_LX = jax.ShapeDtypeStruct(
    (blocks * rows.shape[0], d_key_ZX.shape[1]), jnp.float32
  )
  copies = gpu_gather.num_tile_copies(
    inputs.latent_ZC.shape[1], inputs.rope_ZR.shape[1]
  )
  *d_queries, d_row_LX = plgpu.kernel(
    functools.partial(gpu_backward_kernel.kernel, scale, True),
    out_type=(*d_queries, d_row_LX),
    scratch_types=gpu_backward_kernel.buffers(inputs, copies),
    compiler_params=gpu_tiles.parameters(),
    interpret=interpret,
    **_grid(inputs),
  )(
    *inputs._replace(
      latent_ZC=inputs.latent_ZC[fetched], rope_ZR=inputs.rope_ZR[fetched]
    )
  )
  listed = jnp.tile(rows, blocks)
  d_row_LX = jnp.where(listed[:, None] >= 0, d_row_LX, 0.0)
  zeros_ZX = jnp.zeros(d_key_ZX.shape, jnp.float32)
  return *d_queries, zeros_ZX.at[jnp.maximum(listed, 0)].add(d_row_LX)


def _outputs(inputs):
  """Describes the gradients of queries and of [latent | rope]."""
  num_keys, latent = inputs.latent_ZC.shape
  width = latent + inputs.rope_ZR.shape[1]
  return (
    jax.ShapeDtypeStruct(inputs.query_latent_YHC.shape, jnp.bfloat16),
    jax.ShapeDtypeStruct(inputs.query_rope_YHR.shape, jnp.bfloat16),
    jax.ShapeDtypeStruct((num_keys, width), jnp.float32),
  )


def _grid(inputs):
  queries, heads, _ = inputs.query_rope_YHR.shape
  return dict(
    grid=(queries * heads // gpu.HEADS,),
    grid_names=("block",),
    num_threads=gpu_backward_kernel.GATHER + 1,
    thread_name="role",
  )
