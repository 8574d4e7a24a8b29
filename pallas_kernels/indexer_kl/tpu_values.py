"""The values of the KL loss on TPU: one walk over the tiles; see `tpu`."""
# B batch, T queries, K index width, C queries of a tile, Z keys of a tile

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.indexer_kl import tpu_tiles as tiles

# Rows of the result.
KL, MASS, LSE = range(3)
# Rows of the running sums.
_MASS, _ENTROPY, _CROSS, _TOP, _TOTAL = range(5)


def values(sizes, interpret, scale, inputs, tables):
  """Returns kl, mass and index log-sum-exp of each query in rows [B,8,T]."""
  batch, heads, width, num_queries = inputs.index_query_BIKT.shape
  del heads, width
  tile_ZC = pltpu.VMEM((sizes.keys, sizes.queries), jnp.float32)
  result = jax.ShapeDtypeStruct((batch, tiles.ROWS, num_queries), jnp.float32)
  row_spec = pl.BlockSpec(
    (1, tiles.ROWS, sizes.queries), lambda b, q, k, h, *_: (b, 0, q)
  )
  return pl.pallas_call(
    functools.partial(_values_kernel, sizes, scale),
    out_shape=result,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=tiles.grid(sizes),
      in_specs=tiles.input_specs(sizes, inputs),
      out_specs=row_spec,
      scratch_shapes=[
        tile_ZC,
        tile_ZC,
        pltpu.VMEM((tiles.ROWS, sizes.queries), jnp.float32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tiles.VMEM_BYTES,
    ),
    cost_estimate=tiles.cost(inputs, 1),
    interpret=interpret,
    name="indexer_kl_values",
  )(*tables, *inputs)


def _values_kernel(sizes, scale, needed, fetch, *refs):
  del fetch
  *inputs, result_8C, mass_ZC, score_ZC, sums_8C = refs
  inputs = tiles.Inputs(*inputs)
  b, q, k, h = (pl.program_id(axis) for axis in range(4))

  @pl.when((k == 0) & (h == 0))
  def _():
    sums_8C[...] = jnp.zeros_like(sums_8C)
    sums_8C[_TOP : _TOP + 1] = jnp.full(
      (1, sizes.queries), tiles.HIDDEN, jnp.float32
    )

  @pl.when(needed[tiles.tile_number(sizes, b, q, k)] > 0)
  def _():
    tiles.fill(sizes, scale, h, inputs, mass_ZC, score_ZC)

    @pl.when(h == sizes.head_groups - 1)
    def _():
      _fold(sizes, inputs, mass_ZC, score_ZC, sums_8C)

  @pl.when((k == sizes.key_tiles - 1) & (h == sizes.head_groups - 1))
  def _():
    result_8C[0] = _finish(sums_8C)


def _fold(sizes, inputs, mass_ZC, score_ZC, sums_8C):
  """Adds a finished tile to the running sums."""

  def row(index):
    return sums_8C[index : index + 1]

  mass_ZC, score_ZC = tiles.in_set(sizes, inputs, mass_ZC, score_ZC)
  top_1C = jnp.maximum(row(_TOP), jnp.max(score_ZC, axis=0, keepdims=True))
  shift_1C = row(_TOP) - top_1C
  held_ZC = mass_ZC > 0
  log_ZC = jnp.log(jnp.where(held_ZC, mass_ZC, 1.0))
  # A hidden key's exp is 0, unless its row has seen none: then `top` is hidden
  # too, and the sum starts anew with the first key that is seen.
  cross_ZC = jnp.where(held_ZC, mass_ZC * (score_ZC - top_1C), 0.0)
  added = {
    _MASS: row(_MASS) + _sum(mass_ZC),
    _ENTROPY: row(_ENTROPY) + _sum(mass_ZC * log_ZC),
    _CROSS: row(_CROSS) + row(_MASS) * shift_1C + _sum(cross_ZC),
    _TOP: top_1C,
    _TOTAL: row(_TOTAL) * jnp.exp(shift_1C) + _sum(jnp.exp(score_ZC - top_1C)),
  }
  for index, value_1C in added.items():
    sums_8C[index : index + 1] = value_1C


def _sum(x_ZC):
  return jnp.sum(x_ZC, axis=0, keepdims=True)


def _finish(sums_8C):
  """Turns the running sums into the result's rows [8,C]."""
  mass_1C, entropy_1C, cross_1C, top_1C, total_1C = (
    sums_8C[index : index + 1] for index in range(5)
  )
  seen_1C = mass_1C != 0
  safe_1C = jnp.where(seen_1C, mass_1C, 1.0)
  log_total_1C = jnp.log(jnp.where(seen_1C, total_1C, 1.0))
  kl_1C = (entropy_1C - cross_1C) / safe_1C - jnp.log(safe_1C) + log_total_1C
  rows = [
    jnp.where(seen_1C, kl_1C, 0.0),
    mass_1C,
    jnp.where(seen_1C, top_1C + log_total_1C, jnp.inf),
  ]
  rest = jnp.zeros((tiles.ROWS - len(rows), mass_1C.shape[1]), jnp.float32)
  return jnp.concatenate([*rows, rest])
