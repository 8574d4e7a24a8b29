"""The KL loss over listed keys as Hopper kernels.

Queries of all sequences go in chunks of at most 512. `gathered_gpu_mass` leaves
each listed key's target mass, summed over the heads, `gathered_gpu_index` its
index score; XLA makes the KL and its slopes of them, and `gathered_gpu_index`
gradients of the slopes. In global memory a chunk takes three blocks [C,N] of
floats; the gradient of the index keys is summed up in float32.
"""
# B batch, T queries, S keys, I index heads, K index width, H attention heads,
# L latent width, R rope width, N selected keys; Y all queries of the batch, Z
# all keys, C queries of a chunk

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.indexer_kl import gathered
from pallas_kernels.indexer_kl import gathered_gpu_index as index
from pallas_kernels.indexer_kl import gathered_gpu_mass as mass
from pallas_kernels.sparse_mla import gpu as lists

CHUNK = 512
# Widest index queries; widest [latent | rope] with room for two slots.
MAX_HEADS, MAX_WIDTH, MAX_KEY_WIDTH = index.HEADS, index.WIDTH, 576
# Log-sum-exp of a head that does not count.
_NONE = 1e30


class _Queries(NamedTuple):
  """Queries as the kernels read them, all sequences one after the other."""

  latent_YHL: jax.Array
  rope_YHR: jax.Array
  lse_YH: jax.Array
  index_YIK: jax.Array
  weight_YI: jax.Array
  rows_YN: jax.Array
  blocks_Y: jax.Array
  cotangent_Y: jax.Array | None


def evaluate(scale, trained, constants, weight_BT, *, interpret=False):
  """Returns (kl_BT, gradients of sum(weight kl) by `trained`, or None).

  Args:
    scale, trained, constants, weight_BT: as for `gathered.evaluate`. Heads and
      widths are filled up to those of the kernels.
    interpret: what to give `plgpu.kernel` as `interpret`.

  Raises:
    ValueError: a dtype other than bfloat16 (of index weights: any), or heads
      and widths that do not fit.
  """
  query_BTIK, key_BSK, weight_BTI = trained
  latent_BSL, rope_BSR = constants[2:4]
  _check(query_BTIK, key_BSK, *constants[:4])
  batch, num_queries, heads, width = query_BTIK.shape
  num_keys = key_BSK.shape[1]
  queries = _arrange(trained, constants, weight_BT)
  keys = [
    _fill_width(x.reshape(batch * num_keys, -1), mass.PIECE)
    for x in (latent_BSL, rope_BSR)
  ]
  index_ZK = _fill_width(key_BSK.reshape(batch * num_keys, -1), MAX_WIDTH)

  def body(d_key_ZK, own):
    return _chunk(scale, interpret, keys, index_ZK, d_key_ZK, own)

  zeros_ZK = jnp.zeros(index_ZK.shape, jnp.float32)
  d_key_ZK, outputs = lax.scan(body, zeros_ZK, queries)
  shape = (batch, num_queries)
  kl_BT, by_query = jax.tree.map(
    lambda x: _unchunk(x, batch * num_queries).reshape(*shape, *x.shape[2:]),
    outputs,
  )
  if weight_BT is None:
    return kl_BT, None
  d_query_BTIK, d_weight_BTI = by_query
  d_key_BSK = d_key_ZK.reshape(batch, num_keys, -1)
  return kl_BT, (
    d_query_BTIK[:, :, :heads, :width].astype(query_BTIK.dtype),
    d_key_BSK[..., :width].astype(key_BSK.dtype),
    d_weight_BTI[:, :, :heads].astype(weight_BTI.dtype),
  )


def _chunk(scale, interpret, keys, index_ZK, d_key_ZK, own):
  """Returns d_key_ZK with a chunk's share, and the chunk's results."""
  listed = (own.rows_YN, own.blocks_Y)
  mass_CN = mass.masses(
    (own.latent_YHL, own.rope_YHR),
    own.lse_YH,
    keys,
    *listed,
    scale,
    interpret=interpret,
  )
  score_CN = index.scores(
    own.index_YIK, own.weight_YI, index_ZK, *listed, interpret=interpret
  )
  kl_C, slope_CN = gathered.kl_and_slope(mass_CN, score_CN, own.rows_YN >= 0)
  if own.cotangent_Y is None:
    return d_key_ZK, (kl_C, None)
  query_CIK = own.index_YIK.astype(jnp.float32)
  weight_CI1 = own.weight_YI[..., None]
  u_CIK, d_key_ZK = index.gradients(
    own.index_YIK,
    (query_CIK * weight_CI1).astype(jnp.bfloat16),
    slope_CN * own.cotangent_Y[:, None],
    index_ZK,
    *listed,
    d_key_ZK,
    interpret=interpret,
  )
  d_weight_CI = jnp.sum(u_CIK * query_CIK, axis=-1)
  return d_key_ZK, (kl_C, (u_CIK * weight_CI1, d_weight_CI))


def _arrange(trained, constants, weight_BT):
  """Returns `_Queries` in chunks, filled up as the kernels want them."""
  query_BTIK, key_BSK, weight_BTI = trained
  latent_BTHL, rope_BTHR, _, _, lse_BTH, indices_BTN = constants
  missing = -indices_BTN.shape[2] % index.STEP
  indices_BTN = jnp.pad(
    indices_BTN, [(0, 0), (0, 0), (0, missing)], constant_values=-1
  )
  rows_YN, blocks_Y = lists.list_rows(indices_BTN, key_BSK.shape[1])
  lse_YH = lse_BTH.reshape(-1, lse_BTH.shape[2])
  lse_YH = jnp.where(lse_YH == -jnp.inf, _NONE, lse_YH)
  lse_YH = jnp.pad(
    lse_YH, [(0, 0), (0, -lse_YH.shape[1] % mass.HEADS)], constant_values=_NONE
  )
  weight_YI1 = lists.fill_heads(weight_BTI.astype(jnp.float32)[..., None])
  queries = _Queries(
    _fill_width(lists.fill_heads(latent_BTHL), mass.PIECE),
    _fill_width(lists.fill_heads(rope_BTHR), mass.PIECE),
    lse_YH,
    _fill_width(lists.fill_heads(query_BTIK), MAX_WIDTH),
    weight_YI1[..., 0],
    rows_YN,
    blocks_Y,
    None if weight_BT is None else weight_BT.reshape(-1).astype(jnp.float32),
  )
  chunks = jax.tree.map(_in_chunks, queries)
  return chunks._replace(rows_YN=_in_chunks(rows_YN, fill=-1))


def _in_chunks(array_YX, fill=0):
  """Returns [chunks, C, ...], where the last queries may be made up."""
  count = array_YX.shape[0]
  chunk = min(CHUNK, count)
  filled = [(0, -count % chunk)] + [(0, 0)] * (array_YX.ndim - 1)
  padded_YX = jnp.pad(array_YX, filled, constant_values=fill)
  return padded_YX.reshape(-1, chunk, *array_YX.shape[1:])


def _unchunk(array_MCX, count):
  return array_MCX.reshape(-1, *array_MCX.shape[2:])[:count]


def _fill_width(array_X, multiple):
  """Fills up the last axis with zeros to a multiple."""
  filled = [(0, 0)] * (array_X.ndim - 1) + [(0, -array_X.shape[-1] % multiple)]
  return jnp.pad(array_X, filled)


def _check(query_BTIK, key_BSK, latent_BTHL, rope_BTHR, latent_BSL, rope_BSR):
  heads, width = query_BTIK.shape[2:]
  if heads > MAX_HEADS or width > MAX_WIDTH:
    raise ValueError(f"{query_BTIK.shape=}: at most {MAX_HEADS=}, {MAX_WIDTH=}")
  widths = [-(-x.shape[2] // mass.PIECE) for x in (latent_BSL, rope_BSR)]
  if sum(widths) * mass.PIECE > MAX_KEY_WIDTH:
    raise ValueError(
      f"{latent_BSL.shape=} and {rope_BSR.shape=}: at most {MAX_KEY_WIDTH=}"
    )
  arrays = (query_BTIK, key_BSK, latent_BTHL, rope_BTHR, latent_BSL, rope_BSR)
  for array in arrays:
    if array.dtype != jnp.bfloat16:
      raise ValueError(f"{array.dtype=} must be bfloat16")
