"""The gradients of the KL loss on TPU: a second walk over the tiles; see `tpu`.

With each query's mass M and log-sum-exp known, a tile's slope is
weight (exp(score - lse) - m / M). For each index head i, gated where
q_i . k > 0: u_i += k^T (gated slope), and dk += (gated slope w_i) q_i. What
follows from u, dq_i = w_i u_i and dw_i = q_i . u_i, is left to XLA.

u of a query tile stays in VMEM over all key tiles. dk belongs to the key tile:
each step reads its sum so far from HBM while the heads are computed, and writes
it back, 512 KB for a tile that takes microseconds; therefore the grid runs in
order.
"""
# B batch, T queries, S keys, I index heads, K index width, C queries of a tile,
# Z keys of a tile

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.indexer_kl import tpu_tiles as tiles

# Rows of what a query brings along.
_WEIGHT, _MASS_INVERSE, _LSE = range(3)


def gradients(
  sizes, interpret, scale, inputs, tables, mass_BT, lse_BT, trained, weight_BT
):
  """Returns the gradients of sum(weight kl) by the trained arrays.

  Args:
    sizes: `tiles.Sizes`.
    interpret: as for `pallas_call`.
    scale: factor of the attention's scores.
    inputs: `tiles.Inputs`.
    tables: `tiles.Tables`.
    mass_BT: target mass of each query, padded; 0 for an empty set.
    lse_BT: log-sum-exp of its index scores, padded; inf for an empty set.
    trained: index query, key and weight as they were given.
    weight_BT: factor of each query's KL, not padded.
  """
  index_query_BTIK, index_key_BSK, weight_BTI = trained
  num_queries, num_keys = weight_BT.shape[1], index_key_BSK.shape[1]
  padding = [(0, 0), (0, mass_BT.shape[1] - num_queries)]
  rows_B8T = jnp.stack(
    [
      jnp.pad(weight_BT.astype(jnp.float32), padding),
      jnp.where(mass_BT != 0, 1 / jnp.where(mass_BT != 0, mass_BT, 1.0), 0.0),
      lse_BT,
      *[jnp.zeros_like(lse_BT)] * (tiles.ROWS - 3),
    ],
    axis=1,
  )
  u_BIKT, d_key_BSK = _call(sizes, interpret, scale, inputs, tables, rows_B8T)
  u_BTIK = u_BIKT[..., :num_queries].transpose(0, 3, 1, 2)
  d_query_BTIK = u_BTIK * weight_BTI.astype(jnp.float32)[..., None]
  d_weight_BTI = jnp.sum(u_BTIK * index_query_BTIK.astype(jnp.float32), axis=-1)
  return (
    d_query_BTIK.astype(index_query_BTIK.dtype),
    d_key_BSK[:, :num_keys].astype(index_key_BSK.dtype),
    d_weight_BTI.astype(weight_BTI.dtype),
  )


def _call(sizes, interpret, scale, inputs, tables, rows_B8T):
  """Returns u [B,I,K,T] and the index keys' gradient [B,S,K], float32."""
  heads, width = inputs.index_query_BIKT.shape[1:3]
  queries, keys = sizes.queries, sizes.keys
  tile_ZC = pltpu.VMEM((keys, queries), jnp.float32)
  tile_ZK = pltpu.VMEM((keys, width), jnp.float32)
  d_key_BSK = jnp.zeros(inputs.index_key_BSK.shape, jnp.float32)
  extra = (
    inputs.index_query_BIKT.swapaxes(2, 3),
    inputs.index_key_BSK.swapaxes(1, 2),
    rows_B8T,
  )
  in_specs = [
    *tiles.input_specs(sizes, inputs),
    pl.BlockSpec((1, heads, queries, width), lambda b, q, *_: (b, 0, q, 0)),
    pl.BlockSpec(
      (1, width, keys),
      lambda b, q, k, h, needed, fetch: (
        *(b, 0),
        fetch[tiles.tile_number(sizes, b, q, k)],
      ),
    ),
    pl.BlockSpec((1, tiles.ROWS, queries), lambda b, q, *_: (b, 0, q)),
    pl.BlockSpec(memory_space=pl.ANY),
  ]
  out_specs = [
    pl.BlockSpec((1, heads, width, queries), lambda b, q, *_: (b, 0, 0, q)),
    pl.BlockSpec(memory_space=pl.ANY),
  ]
  return pl.pallas_call(
    functools.partial(_kernel, sizes, scale),
    out_shape=[
      jax.ShapeDtypeStruct(inputs.index_query_BIKT.shape, jnp.float32),
      jax.ShapeDtypeStruct(d_key_BSK.shape, jnp.float32),
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=tiles.grid(sizes),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[
        *(tile_ZC, tile_ZC, tile_ZK, tile_ZK),
        pltpu.SemaphoreType.DMA,
      ],
    ),
    input_output_aliases={len(in_specs) + 1: 1},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",) * 4,
      vmem_limit_bytes=tiles.VMEM_BYTES,
    ),
    cost_estimate=tiles.cost(inputs, 3),
    interpret=interpret,
    name="indexer_kl_gradients",
  )(*tables, *inputs, *extra, d_key_BSK)


def _kernel(sizes, scale, needed, fetch, *refs):
  del fetch
  count = len(tiles.Inputs._fields)
  inputs = tiles.Inputs(*refs[:count])
  query_ICK, key_KZ, rows_8C, _, u_IKC, d_key_BSK, *scratch = refs[count:]
  mass_ZC, score_ZC, old_ZK, new_ZK, semaphore = scratch
  b, q, k, h = (pl.program_id(axis) for axis in range(4))

  @pl.when((k == 0) & (h == 0))
  def _():
    u_IKC[...] = jnp.zeros_like(u_IKC)

  @pl.when(needed[tiles.tile_number(sizes, b, q, k)] > 0)
  def _():
    tiles.fill(sizes, scale, h, inputs, mass_ZC, score_ZC)

    @pl.when(h == sizes.head_groups - 1)
    def _():
      place = d_key_BSK.at[b, pl.ds(k * sizes.keys, sizes.keys)]
      read = pltpu.make_async_copy(place, old_ZK, semaphore)
      read.start()
      _slope(sizes, inputs, rows_8C, mass_ZC, score_ZC)
      _heads(inputs, query_ICK, key_KZ, score_ZC, u_IKC, new_ZK)
      read.wait()
      new_ZK[...] += old_ZK[...]
      write = pltpu.make_async_copy(new_ZK, place, semaphore)
      write.start()
      write.wait()


def _slope(sizes, inputs, rows_8C, mass_ZC, score_ZC):
  """Overwrites a tile's scores by the weighted slope, 0 outside the set."""
  found_ZC, hidden_ZC = tiles.in_set(sizes, inputs, mass_ZC, score_ZC)
  weight_1C, inverse_1C, lse_1C = (
    rows_8C[0, row : row + 1] for row in (_WEIGHT, _MASS_INVERSE, _LSE)
  )
  slope_ZC = jnp.exp(hidden_ZC - lse_1C) - found_ZC * inverse_1C
  score_ZC[...] = slope_ZC * weight_1C


def _heads(inputs, query_ICK, key_KZ, slope_ZC, u_IKC, new_ZK):
  """Adds to u, and sets the tile's share of the keys' gradient."""
  key_ZK = inputs.index_key_BSK[0]
  new_ZK[...] = jnp.zeros_like(new_ZK)

  def add(i, carry):
    dot_ZC = tiles.dot(key_ZK, inputs.index_query_BIKT[0, i])
    gated_ZC = jnp.where(dot_ZC > 0, slope_ZC[...], 0.0)
    pulled_ZC = gated_ZC * inputs.weight_BIT[0, pl.ds(i, 1)]
    dtype = key_ZK.dtype
    u_IKC[0, i] += tiles.dot(key_KZ[0], gated_ZC.astype(dtype))
    new_ZK[...] += tiles.dot(pulled_ZC.astype(dtype), query_ICK[0, i])
    return carry

  lax.fori_loop(0, inputs.index_query_BIKT.shape[1], add, 0)
