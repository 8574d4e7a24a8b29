"""Named intermediates of a forward, for comparison with other code.

Names and shapes: `index_scores` [L,B,S,S] with every scale factor and -inf
above the diagonal, `topk_mask` bool of the same shape, `hidden_states`
[L+1,B,S,D] (embeddings, then the residual stream after each layer), `attn_out`
and `ffn_out` [L,B,S,D], `route_weights` [L_moe,B,S,E] (the routed scale
included), `final_norm` [B,S,D], and of layer 0 `l0_qr`, `l0_q_pe`, `l0_k_pe`,
`l0_kv_latent`, `l0_idx_q`, `l0_idx_k`, `l0_idx_w`.
"""

import jax
import jax.numpy as jnp

from dsv32_jax.model import attention
from dsv32_jax.model import transformer
from pallas_kernels import bitmask
from pallas_kernels import index_select

# L layers, B batch, T queries, S keys, E experts, A experts a token


def forward_arrays(
  model: transformer.Transformer, output: transformer.ModelOutput
) -> dict[str, jax.Array]:
  """Collects the arrays of a forward made with record and trace on."""
  parts = [part for part in (output.dense, output.moe) if part is not None]
  first = parts[0].trace
  residual = jnp.concatenate([part.trace["residual"] for part in parts])
  scores, masks = index_arrays(output, first["latent"].shape[2])
  arrays = dict(
    final_norm=output.hidden,
    hidden_states=jnp.concatenate([output.embedding[None], residual]),
    attn_out=jnp.concatenate([part.trace["attention"] for part in parts]),
    ffn_out=jnp.concatenate([part.trace["ffn"] for part in parts]),
    index_scores=scores,
    topk_mask=masks,
    l0_qr=first["query_latent"][0],
    l0_q_pe=first["query_rope"][0],
    l0_kv_latent=first["latent"][0],
    l0_k_pe=first["key_rope"][0],
    l0_idx_q=first["index"].query_BTIK[0],
    l0_idx_k=first["index"].key_BTK[0],
    l0_idx_w=first["index"].weight_BTI[0] * model.config.index_width**0.5,
  )
  if output.moe is not None:
    routing = output.moe.trace["routing"]
    place = jax.nn.one_hot(routing.experts_BTA, model.config.num_experts)
    arrays["route_weights"] = jnp.einsum(
      "LBTA,LBTAE->LBTE", routing.weights_BTA, place
    )
  return {
    name: value if value.dtype == bool else value.astype(jnp.float32)
    for name, value in arrays.items()
  }


def index_arrays(output: transformer.ModelOutput, num_keys: int):
  """Returns index scores and selections of a traced forward.

  Args:
    output: made with record and trace on, with a cache or without.
    num_keys: S, the keys to report.

  Returns:
    scores_LBTS float32 with -inf on keys after the query, mask_LBTS bool.
  """
  scores, masks = [], []
  caches = (None, None)
  if output.cache is not None:
    caches = (output.cache.dense, output.cache.moe)
  for part, cache in zip((output.dense, output.moe), caches):
    if part is None:
      continue
    index = part.trace["index"]
    keys_LBSK = index.key_BTK if cache is None else cache.index_key_BSK
    num_queries = index.query_BTIK.shape[2]
    last = num_queries if cache is None else output.cache.length_B[0]
    slot_T = last - num_queries + jnp.arange(num_queries)
    visible_TS = jnp.arange(num_keys) <= slot_T[:, None]
    scores_LBTS = jax.vmap(index_select.index_scores)(
      index.query_BTIK, keys_LBSK[:, :, :num_keys], index.weight_BTI
    )
    scores.append(jnp.where(visible_TS, scores_LBTS, -jnp.inf))
    masks.append(_selected(part.selection, visible_TS, scores_LBTS.shape))
  return jnp.concatenate(scores), jnp.concatenate(masks)


def _selected(recorded, visible_TS, shape):
  """Unpacks a recorded selection; None selected every visible key."""
  if recorded is None:
    return jnp.broadcast_to(visible_TS, shape)
  num_keys = shape[-1]
  if recorded.dtype != jnp.uint32:
    pack = lambda indices: bitmask.from_indices(indices, num_keys)
    recorded = jax.vmap(pack)(recorded)
  words = -(-num_keys // 32)
  unpack = lambda mask: bitmask.unpack(mask[..., :words], num_keys)
  return jax.vmap(unpack)(recorded)


def options_with(
  model: transformer.Transformer, *, index_quantized: bool
) -> attention.AttentionOptions:
  """The model's default attention, with exact or emulated 8-bit scores."""
  return attention.AttentionOptions(
    select=model.default_options().select, index_quantized=index_quantized
  )
