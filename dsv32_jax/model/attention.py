"""Three forms of one attention over latents, and the choice between them.

`expanded` makes keys and values for every head (multi-head form, masked by the
selection), `absorbed` moves the expansion to the query side and attends over
the latents themselves (multi-query form), `gathered` does so over the selected
latents only. Paper section 2.1 and appendix A.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.model import cost_rule
from dsv32_jax.model import indexer as indexer_lib
from dsv32_jax.model import selection as selection_lib
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


KERNELS = ("xla", "gpu", "tpu", "tpu_interpret")
# Logical axes of what has one row a query.
ROWS = ("batch", "queries", None)
FORMS = {"expanded": expanded, "absorbed": absorbed, "gathered": gathered}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """How the attention of a forward runs; hashable, static under jit.

  Attributes:
    select: which keys a query attends to.
    form: a name in FORMS, or None for the cost rule.
    indexer_loss: also return the indexer's KL to the attention over the same
      keys (paper equations 3 and 4).
    index_quantized: emulate the official 8-bit index scores.
    kernels: implementation of the operations, a name that their fronts in
      `pallas_kernels` know, or None for what the device runs best.
  """

  select: selection_lib.Selector
  form: str | None = None
  indexer_loss: bool = False
  index_quantized: bool = False
  kernels: str | None = None

  def __post_init__(self):
    if self.form is not None and self.form not in FORMS:
      raise ValueError(f"form={self.form!r} is not one of {sorted(FORMS)}")
    if self.form == "gathered" and self.select == selection_lib.DENSE:
      raise ValueError("form='gathered' needs a selection, select is Dense()")
    if self.kernels not in (None, *KERNELS):
      raise ValueError(f"kernels={self.kernels!r} is not one of {KERNELS}")


def select(options, form, index, index_key_BSK, sight, *, layer, replay):
  """Chooses each query's keys, on each device for its own queries.

  Args:
    options: holds the selector.
    form: name of the attention form: `gathered` wants indices, others a mask.
    index: IndexInputs of the queries.
    index_key_BSK: every index key.
    sight: visibility of the queries.
    layer: int32 scalar, the layer's number.
    replay: a recorded selection to use instead, or None.

  Returns:
    A Selection, or None where every visible key is selected.
  """
  want_indices = form == "gathered"
  kernels = cost_rule.choose_kernels(
    options, sight.slots_BT.shape[1], index.query_BTIK.dtype
  )
  if replay is not None:
    wanted = options.select.k if want_indices else None

    def convert(replay):
      return (
        selection_lib.from_replay(
          replay,
          num_keys=index_key_BSK.shape[1],
          want_indices=wanted,
          kernels=kernels,
        ),
      )

    (keys,) = sharding.shard_call(convert, (replay,), (ROWS,), (ROWS,))
    invalid_BT = None
  elif options.select == selection_lib.DENSE:
    return None
  else:
    keys, invalid_BT = _choose(
      options, want_indices, kernels, index, index_key_BSK, sight, layer
    )
  keys = ad_checkpoint.checkpoint_name(keys, "selection")
  if want_indices:
    return selection_lib.Selection(None, keys, invalid_BT)
  return selection_lib.Selection(keys, None, invalid_BT)


def _choose(options, want_indices, kernels, index, index_key_BSK, sight, layer):
  """Runs the selector: keys, words or indices, and invalid_BT."""

  def choose(query, weight, slots, query_segments, key, key_segments, layer):
    chosen = options.select(
      indexer_lib.IndexInputs(query, None, weight),
      key,
      selection_lib.Visibility(slots, query_segments, key_segments),
      layer=layer,
      want_indices=want_indices,
      kernels=kernels,
    )
    keys = chosen.indices_BTN if want_indices else chosen.mask_BTW
    return keys, chosen.invalid_BT

  return sharding.shard_call(
    choose,
    (
      index.query_BTIK,
      index.weight_BTI,
      sight.slots_BT,
      sight.query_segments_BT,
      index_key_BSK,
      sight.key_segments_BS,
      layer,
    ),
    (
      ("batch", "queries", None, None),
      ROWS,
      ("batch", "queries"),
      ("batch", "queries"),
      ("batch", None, None),
      ("batch", None),
      (),
    ),
    (ROWS, ("batch", "queries")),
  )


def attend(options, form, projected, chosen, sight, index, index_key, *, scale):
  """Runs a form, on each device for its own queries and all heads of them.

  Keeping a query's heads together trades heads for queries by an all-to-all
  where `tensor` splits the heads, and lets the KL sum over heads in place.

  Returns:
    values_BTHV, and kl_BT float32 where options.indexer_loss, else None.
  """
  keys = None
  if chosen is not None:
    gathers = form == "gathered"
    keys = chosen.indices_BTN if gathers else chosen.mask_BTW
  loss = options.indexer_loss
  kernels = cost_rule.choose_kernels(
    options, sight.slots_BT.shape[1], projected.latent_BSC.dtype
  )

  def run(*args):
    projected, (keys, slots, query_segments, key_segments) = (
      Projected(*args[:6]),
      args[6:10],
    )
    chosen = keys
    if keys is not None:
      chosen = selection_lib.Selection(keys, keys, None)
    sight = selection_lib.Visibility(slots, query_segments, key_segments)
    index = None
    if loss:
      index = indexer_lib.IndexInputs(args[10], None, args[11])
    values_BTHV, kl_BT = FORMS[form](
      projected, chosen, sight, index, args[12], scale=scale, kernels=kernels
    )
    return (values_BTHV, kl_BT) if loss else (values_BTHV,)

  per_query, per_head = ("batch", "queries"), ("batch", "queries", None, None)
  per_key, whole = ("batch", None, None), (None, None, None)
  results = sharding.shard_call(
    run,
    (
      *projected,
      keys,
      *sight,
      index.query_BTIK if loss else None,
      index.weight_BTI if loss else None,
      index_key if loss else None,
    ),
    (
      *(per_head, per_head, per_key, per_key, whole, whole),
      *((*per_query, None), per_query, per_query, ("batch", None)),
      *(per_head, (*per_query, None), per_key),
    ),
    (per_head, per_query)[: 2 if loss else 1],
  )
  values_BTHV = ad_checkpoint.checkpoint_name(results[0], "attention")
  return values_BTHV, results[1] if loss else None
