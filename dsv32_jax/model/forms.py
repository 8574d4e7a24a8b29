"""Three forms of one attention over latents, as functions of arrays.

`expanded` makes keys and values for every head (multi-head form, masked by the
selection), `absorbed` moves the expansion to the query side and attends over
the latents themselves (multi-query form), `gathered` does so over the selected
latents only. Paper section 2.1 and appendix A.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import indexer_kl
from pallas_kernels import masked_attention
from pallas_kernels import sparse_mla

# B batch, T queries, S keys, C latent, H heads, N nope width, R rotary width,
# Q = N + R, V value width, I index heads, K index width


class Projected(NamedTuple):
  """Queries of a layer's tokens and the latents they attend to."""

  query_nope_BTHN: jax.Array
  query_rope_BTHR: jax.Array
  latent_BSC: jax.Array
  key_rope_BSR: jax.Array
  key_up_CHN: jax.Array
  value_up_CHV: jax.Array


def expanded(
  projected, chosen, sight, index, index_key_BSK, *, scale, kernels=None
):
  """Attends in multi-head form; keys are expanded for every head.

  Args:
    projected: queries, latents and expansions.
    chosen: a Selection with a mask, or None for every visible key.
    sight: the Visibility of the queries.
    index: IndexInputs if the indexer's KL is wanted, else None.
    index_key_BSK: index keys, where index is given.
    scale: softmax scale.
    kernels: implementation to ask the operations for.

  Returns:
    values_BTHV, and kl_BT float32 or None.
  """
  key_nope_BSHN = jnp.einsum(
    "BSC,CHN->BSHN", projected.latent_BSC, projected.key_up_CHN
  )
  key_rope_BSHR = jnp.broadcast_to(
    projected.key_rope_BSR[:, :, None],
    (*key_nope_BSHN.shape[:3], projected.key_rope_BSR.shape[-1]),
  )
  key_BSHQ = jnp.concatenate([key_nope_BSHN, key_rope_BSHR], axis=-1)
  value_BSHV = jnp.einsum(
    "BSC,CHV->BSHV", projected.latent_BSC, projected.value_up_CHV
  )
  query_BTHQ = jnp.concatenate(
    [projected.query_nope_BTHN, projected.query_rope_BTHR], axis=-1
  )
  return _masked(
    query_BTHQ,
    key_BSHQ,
    value_BSHV,
    chosen,
    sight,
    index,
    index_key_BSK,
    scale,
    kernels,
  )


def absorbed(
  projected, chosen, sight, index, index_key_BSK, *, scale, kernels=None
):
  """Attends in multi-query form over the latents; as `expanded`."""
  query_BTHQ = jnp.concatenate(
    [absorb_query(projected), projected.query_rope_BTHR], axis=-1
  )
  key_BSQ = jnp.concatenate(
    [projected.latent_BSC, projected.key_rope_BSR], axis=-1
  )
  out_BTHC, kl_BT = _masked(
    query_BTHQ,
    key_BSQ[:, :, None],
    projected.latent_BSC[:, :, None],
    chosen,
    sight,
    index,
    index_key_BSK,
    scale,
    kernels,
  )
  return jnp.einsum("BTHC,CHV->BTHV", out_BTHC, projected.value_up_CHV), kl_BT


def gathered(
  projected, chosen, sight, index, index_key_BSK, *, scale, kernels=None
):
  """Attends in multi-query form over the selected latents; as `expanded`.

  The selection is needed as indices.
  """
  del sight
  query_latent_BTHC = absorb_query(projected)
  out_BTHC, lse_BTH = sparse_mla.sparse_mla(
    query_latent_BTHC,
    projected.query_rope_BTHR,
    projected.latent_BSC,
    projected.key_rope_BSR,
    chosen.indices_BTN,
    scale=scale,
    indices_are_sorted=True,
    implementation=kernels,
  )
  kl_BT = None
  if index is not None:
    kl_BT = indexer_kl.indexer_kl_gathered(
      index.query_BTIK,
      index_key_BSK,
      index.weight_BTI,
      query_latent_BTHC,
      projected.query_rope_BTHR,
      projected.latent_BSC,
      projected.key_rope_BSR,
      lse_BTH,
      chosen.indices_BTN,
      scale=scale,
      indices_are_sorted=True,
      implementation=kernels,
    )
  return jnp.einsum("BTHC,CHV->BTHV", out_BTHC, projected.value_up_CHV), kl_BT


def absorb_query(projected: Projected):
  """Moves the key expansion to the query: query_latent_BTHC."""
  return jnp.einsum(
    "BTHN,CHN->BTHC", projected.query_nope_BTHN, projected.key_up_CHN
  )


def _masked(
  query, key, value, chosen, sight, index, index_key_BSK, scale, kernels
):
  """Masked attention and, where index is given, the indexer's KL on it."""
  mask_BTW = None if chosen is None else chosen.mask_BTW
  visible = dict(
    mask_BTW=mask_BTW,
    query_segments_BT=sight.query_segments_BT,
    key_segments_BS=sight.key_segments_BS,
    implementation=kernels,
  )
  out, lse_BTH = masked_attention.masked_attention(
    query, key, value, sight.slots_BT, scale=scale, **visible
  )
  if index is None:
    return out, None
  kl_BT = indexer_kl.indexer_kl(
    index.query_BTIK,
    index_key_BSK,
    index.weight_BTI,
    query,
    key,
    lse_BTH,
    sight.slots_BT,
    scale=scale,
    **visible,
  )
  return out, kl_BT


FORMS = {"expanded": expanded, "absorbed": absorbed, "gathered": gathered}
