"""Multi-head latent attention with DeepSeek Sparse Attention.

Each token leaves a latent of C numbers, one rotated key of R and one index key
of K; attention.py attends to them.
"""

from flax import nnx

from dsv32_jax.model import attention as attention_lib
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import cost_rule
from dsv32_jax.model import forms
from dsv32_jax.model import indexer as indexer_lib
from dsv32_jax.model import layers
from dsv32_jax.model import paged_attention
from dsv32_jax.model import rope
from dsv32_jax.model import selection as selection_lib

# B batch, T queries, S keys, D model width, U query latent, C latent, H heads,
# N nope width, R rotary width, Q = N + R, V value width, P rotary pairs


_QUERY_DOWN_AXES = ("embed", "query_latent")
_QUERY_UP_AXES = ("query_latent", "heads", None)
_LATENT_AXES = ("embed", "latent")
_OUTPUT_AXES = ("heads", None, "embed")


class LatentAttention(nnx.Module):
  """One layer's attention with its indexer."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs, dtype):
    self.config = config
    width, heads = config.width, config.num_heads
    rank, latent = config.query_latent_width, config.latent_width
    epsilon = config.norm_epsilon

    def parameter(shape, axes):
      return layers.parameter(
        rngs, shape, axes, scale=config.initializer_scale, dtype=dtype
      )

    self.query_down = parameter((width, rank), _QUERY_DOWN_AXES)
    self.query_norm = layers.RMSNorm(rank, epsilon=epsilon, dtype=dtype)
    self.query_up = parameter((rank, heads, config.query_width), _QUERY_UP_AXES)
    self.latent_down = parameter(
      (width, latent + config.rope_width), _LATENT_AXES
    )
    self.latent_norm = layers.RMSNorm(latent, epsilon=epsilon, dtype=dtype)
    self.key_up = parameter(
      (latent, heads, config.nope_width), attention_lib.UP_AXES
    )
    self.value_up = parameter(
      (latent, heads, config.value_width), attention_lib.UP_AXES
    )
    self.output = parameter((heads, config.value_width, width), _OUTPUT_AXES)
    self.indexer = indexer_lib.Indexer(config, rngs=rngs, dtype=dtype)

  def __call__(
    self,
    x_BTD,
    rotation,
    sight: selection_lib.Visibility,
    options: attention_lib.AttentionOptions,
    *,
    layer,
    cache: cache_lib.LayerCache | None = None,
    length_B=None,
    order=None,
    replay=None,
  ):
    """Attends from x's tokens to themselves, or to the cache they join.

    Args:
      x_BTD: the layer's normed input.
      rotation: cos_BTP and sin_BTP.
      sight: visibility of the queries.
      options: selector and form.
      layer: int32 scalar, the layer's number.
      cache: this layer's cache, or None.
      length_B: tokens the cache holds, where there is one.
      order: TokenOrder of x's tokens, or None for their own.
      replay: a recorded selection, words or indices, or None.

    Returns:
      out_BTD, the new cache, and a dict: `selection`, `kl_BT`, `index`
      (IndexInputs with every key) and `trace` (named intermediates).
    """
    dtype = x_BTD.dtype
    down_BTU, both_BTC = self.project_down(x_BTD)
    query_latent_BTU, query_nope, query_rope = self.project_query(
      down_BTU, rotation
    )
    latent_BTC, key_rope_BTR = self.project_latent(both_BTC, rotation)
    index = self.indexer(
      x_BTD, query_latent_BTU, *rotation, quantized=options.index_quantized
    )
    new = (latent_BTC, key_rope_BTR, index.key_BTK)
    trace = dict(
      query_latent=query_latent_BTU,
      query_rope=query_rope,
      latent=latent_BTC,
      key_rope=key_rope_BTR,
      index=index,
    )
    if isinstance(cache, cache_lib.PagedLayerCache):
      held = cache.append(*new, length_B)
      chosen = paged_attention.select(
        held, index, sight, options, layer=layer, replay=replay
      )
      values_BTHV = paged_attention.attend(
        held,
        (query_nope, query_rope),
        chosen,
        sight,
        options,
        self.key_up[...],
        self.value_up[...],
        scale=self.config.softmax_scale,
      )
      out_BTD = self.project_output(values_BTHV)
      return out_BTD, held, dict(selection=chosen, kl_BT=None, trace=trace)
    held = cache_lib.LayerCache(*new)
    if cache is not None:
      held = cache_lib.LayerCache(
        *(cache_lib.append(a, b, length_B) for a, b in zip(cache, held))
      )
    projected = forms.Projected(
      query_nope,
      query_rope,
      held.latent_BSC.astype(dtype),
      held.key_rope_BSR.astype(dtype),
      self.key_up[...].astype(dtype),
      self.value_up[...].astype(dtype),
    )
    index_key_BSK = held.index_key_BSK.astype(index.query_BTIK.dtype)
    form = cost_rule.choose_form(
      options, x_BTD.shape[1], held.latent_BSC.shape[1]
    )
    layout = attention_lib.KeyLayout(split=cache is None, order=order)
    chosen = attention_lib.select(
      *(options, form, index, index_key_BSK, sight),
      layer=layer,
      replay=replay,
      layout=layout,
    )
    values_BTHV, kl_BT = attention_lib.attend(
      options,
      form,
      projected,
      chosen,
      sight,
      index,
      index_key_BSK,
      scale=self.config.softmax_scale,
      layout=layout,
    )
    out_BTD = self.project_output(values_BTHV)
    found = dict(selection=chosen, kl_BT=kl_BT, trace=trace)
    return out_BTD, held if cache is not None else None, found

  def project_output(self, values_BTHV):
    """Joins the heads: out_BTD."""
    output_HVD = self.output[...].astype(values_BTHV.dtype)
    return layers.product(
      "BTHV,HVD->BTD", values_BTHV, output_HVD, _OUTPUT_AXES
    )

  def project_down(self, x_BTD):
    """Returns what queries and what keys and values are made of, not normed."""
    dtype = x_BTD.dtype
    return layers.products(
      x_BTD,
      (self.query_down[...].astype(dtype), self.latent_down[...].astype(dtype)),
      (_QUERY_DOWN_AXES, _LATENT_AXES),
      keep=True,
    )

  def project_query(self, down_BTU, rotation):
    """Returns query_latent_BTU (normed), query_nope_BTHN, query_rope_BTHR."""
    query_latent_BTU = self.query_norm(down_BTU)
    query_BTHQ = layers.product(
      "BTU,UHQ->BTHQ",
      query_latent_BTU,
      self.query_up[...].astype(down_BTU.dtype),
      _QUERY_UP_AXES,
    )
    nope = self.config.nope_width
    query_rope_BTHR = rope.rotate_interleaved(query_BTHQ[..., nope:], *rotation)
    return query_latent_BTU, query_BTHQ[..., :nope], query_rope_BTHR

  def project_latent(self, both_BTC, rotation):
    """Returns latent_BTC (normed) and key_rope_BTR (rotated)."""
    rank = self.config.latent_width
    latent_BTC = self.latent_norm(both_BTC[..., :rank])
    return latent_BTC, rope.rotate_interleaved(both_BTC[..., rank:], *rotation)
