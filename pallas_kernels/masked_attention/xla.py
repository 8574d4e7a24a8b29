"""Masked attention in plain XLA: tiles of queries by keys, an online softmax.

One loop walks over blocks, a block being some heads of at most 512 queries; an
inner loop walks over tiles of at most about 512 keys, as many as the block's
last slot needs. A tile costs two matrix products forward and five backward;
the running maximum, sum and output are rescaled tile by tile, and backward
recomputes the weights from the log-sum-exp. Where no query of a block needs a
mask (dense attention below the diagonal), none is built. Memory beyond inputs
and outputs: some tiles of [heads, queries, keys] float32, and backward the
float32 gradients of key and value.
"""
# B batch, T queries, S keys, H heads, G key heads (1 or H), Q query and key
# width, V value width, W words of 32 keys. Blocked: L blocks (batch, heads,
# queries), M parts of the key heads (batch, heads), J tiles of a part's keys;
# in a block P heads share each of its G key heads, T and S are a tile's.

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import bitmask
from pallas_kernels.masked_attention import blocks

# Scores of hidden keys, and the start of the running maximum above them, so
# that exp(hidden - maximum) is 0 even where nothing is seen.
_HIDDEN = -1e30
_FLOOR = -5e29


class _Block(NamedTuple):
  """What one step of the outer loop works on."""

  query_GPTQ: jax.Array
  slots_T: jax.Array
  segments_T: jax.Array | None
  row: jax.Array
  part: jax.Array


def forward(query_BTHQ, key_BSGQ, value_BSGV, visible, scale):
  """Returns (out_BTHV, lse_BTH); see the front for what they are."""
  sizes = blocks.choose_sizes(query_BTHQ.shape, key_BSGQ.shape)
  blocked = blocks.block_inputs(
    sizes, query_BTHQ, key_BSGQ, value_BSGV, visible, scale
  )
  out_LGPTV, lse_LGPT = lax.map(
    lambda index: _forward_block(blocked, sizes, _block(blocked, index)),
    jnp.arange(blocked.row_L.shape[0]),
  )
  queries = query_BTHQ.shape[1]
  out_BTHV = blocks.join_queries(sizes, out_LGPTV, queries)
  lse_BTH1 = blocks.join_queries(sizes, lse_LGPT[..., None], queries)
  return out_BTHV.astype(value_BSGV.dtype), lse_BTH1[..., 0]


def backward(
  query_BTHQ,
  key_BSGQ,
  value_BSGV,
  visible,
  scale,
  out_BTHV,
  lse_BTH,
  d_out_BTHV,
):
  """Returns the gradients of query, key and value in their dtypes."""
  sizes = blocks.choose_sizes(query_BTHQ.shape, key_BSGQ.shape)
  blocked = blocks.block_inputs(
    sizes, query_BTHQ, key_BSGQ, value_BSGV, visible, scale
  )
  d_out = d_out_BTHV.astype(jnp.float32)
  mean_BTH = jnp.sum(d_out * out_BTHV.astype(jnp.float32), axis=-1)
  # An unseen query has lse -inf; with 0 its hidden scores still give exp 0.
  lse_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH)
  extra_L = (
    blocks.block_queries(sizes, d_out),
    blocks.block_queries(sizes, mean_BTH[..., None])[..., 0],
    blocks.block_queries(sizes, lse_BTH[..., None])[..., 0],
  )

  def step(carry, index):
    extra = tuple(array[index] for array in extra_L)
    block = _block(blocked, index)
    return _backward_block(blocked, sizes, carry, block, extra)

  carry = tuple(
    jnp.zeros_like(jnp.swapaxes(array, -1, -2), dtype=jnp.float32)
    for array in (blocked.key_MJGSQ, blocked.value_MJGSV)
  )
  (d_key_MJGQS, d_value_MJGVS), d_query_LGPTQ = lax.scan(
    step, carry, jnp.arange(blocked.row_L.shape[0])
  )
  d_query_BTHQ = scale * blocks.join_queries(
    sizes, d_query_LGPTQ, query_BTHQ.shape[1]
  )
  keys = key_BSGQ.shape[1]
  d_key_BSGQ = blocks.join_keys(sizes, jnp.swapaxes(d_key_MJGQS, -1, -2), keys)
  d_value_BSGV = blocks.join_keys(
    sizes, jnp.swapaxes(d_value_MJGVS, -1, -2), keys
  )
  return (
    d_query_BTHQ.astype(query_BTHQ.dtype),
    d_key_BSGQ.astype(key_BSGQ.dtype),
    d_value_BSGV.astype(value_BSGV.dtype),
  )


def _block(blocked, index):
  """Returns block `index`."""
  row = blocked.row_L[index]
  segments_RT = blocked.segments_RT
  return _Block(
    query_GPTQ=blocked.query_LGPTQ[index],
    slots_T=blocked.slots_RT[row],
    segments_T=None if segments_RT is None else segments_RT[row],
    row=row,
    part=blocked.part_L[index],
  )


def _forward_block(blocked, sizes, block):
  """Returns out [G,P,T,V] and lse [G,P,T] of one block, float32."""
  query_GPTQ = block.query_GPTQ

  def step(masked, tile, carry):
    top_GPT, sum_GPT, out_GPTV = carry
    key_GSQ, value_GSV = _key_tile(blocked, block, tile)
    score_GPTS = _scores(blocked, sizes, block, tile, key_GSQ, masked)
    new_top_GPT = jnp.maximum(top_GPT, jnp.max(score_GPTS, axis=-1))
    exp_GPTS = jnp.exp(score_GPTS - new_top_GPT[..., None])
    shrink_GPT = jnp.exp(top_GPT - new_top_GPT)
    sum_GPT = sum_GPT * shrink_GPT + jnp.sum(exp_GPTS, axis=-1)
    added_GPTV = jnp.einsum("GPTS,GSV->GPTV", exp_GPTS, value_GSV)
    return new_top_GPT, sum_GPT, out_GPTV * shrink_GPT[..., None] + added_GPTV

  rows_GPT = query_GPTQ.shape[:-1]
  width = blocked.value_MJGSV.shape[-1]
  carry = (
    jnp.full(rows_GPT, _FLOOR, jnp.float32),
    jnp.zeros(rows_GPT, jnp.float32),
    jnp.zeros((*rows_GPT, width), jnp.float32),
  )
  top_GPT, sum_GPT, out_GPTV = _over_tiles(blocked, sizes, block, step, carry)
  # NaN scores must stay NaN: only an exact zero means that nothing was seen.
  empty_GPT = sum_GPT == 0.0
  safe_GPT = jnp.where(empty_GPT, 1.0, sum_GPT)
  lse_GPT = jnp.where(empty_GPT, -jnp.inf, top_GPT + jnp.log(safe_GPT))
  return out_GPTV / safe_GPT[..., None], lse_GPT


def _backward_block(blocked, sizes, carry, block, extra):
  """Adds a block's share to (d_key, d_value); returns its d_query/scale."""
  query_GPTQ = block.query_GPTQ
  d_out_GPTV, mean_GPT, lse_GPT = extra

  def step(masked, tile, carry):
    d_query_GPTQ, d_key_MJGQS, d_value_MJGVS = carry
    key_GSQ, value_GSV = _key_tile(blocked, block, tile)
    score_GPTS = _scores(blocked, sizes, block, tile, key_GSQ, masked)
    weight_GPTS = jnp.exp(score_GPTS - lse_GPT[..., None])
    d_weight_GPTS = jnp.einsum("GPTV,GSV->GPTS", d_out_GPTV, value_GSV)
    d_score_GPTS = weight_GPTS * (d_weight_GPTS - mean_GPT[..., None])
    # With keys last: summing over the rows of both factors of a product that
    # has keys first takes XLA twice as long.
    d_value_GVS = jnp.einsum("GPTV,GPTS->GVS", d_out_GPTV, weight_GPTS)
    d_key_GQS = jnp.einsum("GPTQ,GPTS->GQS", query_GPTQ, d_score_GPTS)
    added_GPTQ = jnp.einsum("GPTS,GSQ->GPTQ", d_score_GPTS, key_GSQ)
    return (
      d_query_GPTQ + added_GPTQ,
      _add_tile(d_key_MJGQS, block.part, tile, d_key_GQS),
      _add_tile(d_value_MJGVS, block.part, tile, d_value_GVS),
    )

  carry = (jnp.zeros(query_GPTQ.shape, jnp.float32), *carry)
  d_query_GPTQ, *carry = _over_tiles(blocked, sizes, block, step, carry)
  return tuple(carry), d_query_GPTQ


def _over_tiles(blocked, sizes, block, step, carry):
  """Runs `step(masked, tile, carry)` over the key tiles a block can see."""
  end = jnp.max(block.slots_T) // sizes.keys + 1
  whole = 0
  if blocked.mask_RTW is None and blocked.key_segments_BJS is None:
    whole = (jnp.min(block.slots_T) + 1) // sizes.keys
    carry = lax.fori_loop(0, whole, lambda j, c: step(False, j, c), carry)
  return lax.fori_loop(whole, end, lambda j, c: step(True, j, c), carry)


def _scores(blocked, sizes, block, tile, key_GSQ, masked):
  """Returns the scores [G,P,T,S] of one tile, hidden keys at `_HIDDEN`."""
  score_GPTS = jnp.einsum("GPTQ,GSQ->GPTS", block.query_GPTQ, key_GSQ)
  if not masked:
    return score_GPTS
  position_S = tile * sizes.keys + jnp.arange(sizes.keys, dtype=jnp.int32)
  seen_TS = position_S <= block.slots_T[:, None]
  if block.segments_T is not None:
    batch = block.row // sizes.query_blocks
    key_segments_S = blocked.key_segments_BJS[batch, tile]
    seen_TS &= block.segments_T[:, None] == key_segments_S
  if blocked.mask_RTW is not None:
    words = sizes.keys // bitmask.BITS
    words_1TW = lax.dynamic_slice(
      blocked.mask_RTW, (block.row, 0, tile * words), (1, sizes.queries, words)
    )
    seen_TS &= bitmask.unpack(words_1TW, sizes.keys)[0]
  return jnp.where(seen_TS, score_GPTS, _HIDDEN)


def _key_tile(blocked, block, tile):
  """Returns float32 key [G,S,Q] and value [G,S,V] of one tile."""
  key_GSQ = blocked.key_MJGSQ[block.part, tile]
  value_GSV = blocked.value_MJGSV[block.part, tile]
  return key_GSQ.astype(jnp.float32), value_GSV.astype(jnp.float32)


def _add_tile(total_MJGSX, part, tile, added_GSX):
  start = (part, tile, 0, 0, 0)
  shape = (1, 1, *added_GSX.shape)
  old = lax.dynamic_slice(total_MJGSX, start, shape)
  return lax.dynamic_update_slice(total_MJGSX, old + added_GSX, start)
