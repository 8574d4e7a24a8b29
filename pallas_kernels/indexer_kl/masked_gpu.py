"""The KL loss over masked keys as Hopper kernels.

Queries of a sequence go in chunks of at most 512. `masked_gpu_mass` leaves the
target mass of each pair, summed over the heads, `index_select.gpu` the index
score; XLA hides what a query does not see and makes the KL and its slopes of
them, and `masked_gpu_gradient` gradients of the slopes. In global memory a
chunk takes three blocks [C,P] of floats.
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# G key heads (1 or H), Q query width, W words of 32 keys, C queries of a chunk,
# P padded keys, M blocks of 128 queries, N tiles of 128 keys

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels import tiles
from pallas_kernels.index_select import gpu as index_gpu
from pallas_kernels.indexer_kl import gathered
from pallas_kernels.indexer_kl import masked_gpu_gradient as gradient
from pallas_kernels.indexer_kl import masked_gpu_mass as mass

CHUNK = 512
HEADS, WIDTH = index_gpu.HEADS, index_gpu.WIDTH
# Widest attention heads.
MAX_WIDTH = 256
# Log-sum-exp of a head that does not count.
_NONE = 1e30


class _Queries(NamedTuple):
  """Queries of a sequence, filled up as the kernels want them."""

  index_TIK: jax.Array
  weight_TI: jax.Array
  attention_THQ: jax.Array
  lse_TH: jax.Array
  slots_T: jax.Array
  mask_TW: jax.Array | None
  segments_T: jax.Array | None
  cotangent_T: jax.Array | None


class _Keys(NamedTuple):
  """Keys of a sequence."""

  index_PK: jax.Array
  attention_PGQ: jax.Array
  segments_P: jax.Array | None


def evaluate(scale, trained, constants, weight_BT, *, interpret=False):
  """Returns (kl_BT, gradients of sum(weight kl) by `trained`, or None).

  Args:
    scale, trained, constants, weight_BT: as for `xla.evaluate`. Heads and
      widths are filled up to those of the kernels.
    interpret: what to give `plgpu.kernel` as `interpret`.

  Raises:
    ValueError: a dtype other than bfloat16 (of index weights: any), or heads
      and widths that do not fit.
  """
  query_BTIK, key_BSK, weight_BTI = trained
  query_BTHQ, key_BSGQ, lse_BTH, slots_BT, mask_BTW, segments, key_segments = (
    constants
  )
  _check(query_BTIK, key_BSK, query_BTHQ, key_BSGQ)
  num_queries, heads, width = query_BTIK.shape[1:]
  num_keys = key_BSK.shape[1]
  chunk = min(CHUNK, -(-num_queries // mass.BLOCK) * mass.BLOCK)
  pad_queries = lambda array, fill=0: tiles.pad(
    array, -(-num_queries // chunk) * chunk, fill
  )
  pad_keys = lambda array: tiles.pad(
    array, -(-num_keys // index_gpu.TILE) * index_gpu.TILE
  )
  attention_width = -(-query_BTHQ.shape[3] // 64) * 64
  queries = _Queries(
    pad_queries(_fill(query_BTIK, HEADS, WIDTH)),
    pad_queries(_fill(weight_BTI.astype(jnp.float32), HEADS)),
    pad_queries(_fill(query_BTHQ, attention_width)),
    pad_queries(jnp.where(lse_BTH == -jnp.inf, _NONE, lse_BTH), _NONE),
    pad_queries(jnp.minimum(slots_BT, num_keys - 1).astype(jnp.int32), -1),
    pad_queries(mask_BTW),
    pad_queries(segments),
    None if weight_BT is None else pad_queries(weight_BT.astype(jnp.float32)),
  )
  keys = _Keys(
    pad_keys(_fill(key_BSK, WIDTH)),
    pad_keys(_fill(key_BSGQ, attention_width)),
    pad_keys(key_segments),
  )
  row = functools.partial(_row, scale, interpret, chunk)
  kl_BT, gradients = lax.map(lambda x: row(*x), (queries, keys))
  if weight_BT is None:
    return kl_BT[:, :num_queries], None
  (d_query, d_weight), d_key_BPK = gradients
  return kl_BT[:, :num_queries], (
    d_query[:, :num_queries, :heads, :width].astype(query_BTIK.dtype),
    d_key_BPK[:, :num_keys, :width].astype(key_BSK.dtype),
    d_weight[:, :num_queries, :heads].astype(weight_BTI.dtype),
  )


def _row(scale, interpret, chunk, queries, keys):
  """Returns kl_T and, given cotangents, the gradients of one sequence."""
  chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), queries)
  d_key_PK, outputs = lax.scan(
    functools.partial(_chunk, scale, interpret, keys),
    jnp.zeros(keys.index_PK.shape, jnp.float32),
    chunks,
  )
  kl_T, by_query = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
  return kl_T, None if by_query is None else (by_query, d_key_PK)


def _chunk(scale, interpret, keys, d_key_PK, own):
  """Returns d_key_PK with a chunk's share, and the chunk's results."""
  index_PK, last_C = keys.index_PK, own.slots_T
  seen_CP = _seen(own, keys)
  blocks = (-1, mass.BLOCK, index_PK.shape[0] // mass.TILE, mass.TILE)
  live_MN = jnp.any(seen_CP.reshape(blocks), axis=(1, 3)).astype(jnp.int32)
  mass_CP = mass.masses(
    own.attention_THQ,
    keys.attention_PGQ,
    own.lse_TH.T,
    live_MN,
    scale,
    interpret=interpret,
  )
  score_CP = index_gpu.scores(
    own.index_TIK, index_PK, own.weight_TI, last_C, interpret=interpret
  )
  kl_C, slope_CP = gathered.kl_and_slope(mass_CP, score_CP, seen_CP)
  if own.cotangent_T is None:
    return d_key_PK, (kl_C, None)
  slope_CP = slope_CP * own.cotangent_T[:, None]
  query_CIK = own.index_TIK.astype(jnp.float32)
  weight_CI1 = own.weight_TI[..., None]
  u_CIK = gradient.of_queries(
    own.index_TIK, index_PK, slope_CP, last_C, interpret=interpret
  )
  d_key_PK += gradient.of_keys(
    own.index_TIK,
    (query_CIK * weight_CI1).astype(jnp.bfloat16),
    index_PK,
    slope_CP,
    last_C,
    interpret=interpret,
  )
  d_weight_CI = jnp.sum(u_CIK * query_CIK, axis=-1)
  return d_key_PK, (kl_C, (u_CIK * weight_CI1, d_weight_CI))


def _seen(own, keys):
  """Returns which keys are in the set of each query, bool [C,P]."""
  num_keys = keys.index_PK.shape[0]
  seen_CP = jnp.arange(num_keys) <= own.slots_T[:, None]
  if own.segments_T is not None:
    seen_CP &= own.segments_T[:, None] == keys.segments_P
  if own.mask_TW is not None:
    missing = num_keys // bitmask.BITS - own.mask_TW.shape[1]
    mask_CW = jnp.pad(own.mask_TW, [(0, 0), (0, missing)])
    seen_CP &= bitmask.unpack(mask_CW, num_keys)
  return seen_CP


def _fill(array_X, *sizes):
  """Fills up the last axes with zeros."""
  kept = array_X.ndim - len(sizes)
  missing = [size - own for size, own in zip(sizes, array_X.shape[kept:])]
  return jnp.pad(array_X, [(0, 0)] * kept + [(0, n) for n in missing])


def _check(query_BTIK, key_BSK, query_BTHQ, key_BSGQ):
  heads, width = query_BTIK.shape[2:]
  if heads > HEADS or width > WIDTH:
    raise ValueError(f"{query_BTIK.shape=}: at most {HEADS=}, {WIDTH=}")
  if query_BTHQ.shape[3] > MAX_WIDTH:
    raise ValueError(f"{query_BTHQ.shape=}: at most {MAX_WIDTH=}")
  for array in (query_BTIK, key_BSK, query_BTHQ, key_BSGQ):
    if array.dtype != jnp.bfloat16:
      raise ValueError(f"{array.dtype=} must be bfloat16")
