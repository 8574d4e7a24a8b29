"""DeepSeek-V3.2: one forward for training, scoring, prefill and decode."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.model import attention as attention_lib
from dsv32_jax.model import block as block_lib
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import layers
from dsv32_jax.model import mtp as mtp_lib
from dsv32_jax.model import rope
from dsv32_jax.model import selection as selection_lib
from dsv32_jax.model import token_order

# B batch, T tokens, S slots, D model width, L layers, A experts a token


class Replay(NamedTuple):
  """Recorded choices to use instead of making them.

  Attributes:
    selection: [L,B,T,W] words or [L,B,T,N] indices over all layers, or None.
    experts: int32 [L,B,T,A] over the MoE layers, or None.
  """

  selection: jax.Array | None = None
  experts: jax.Array | None = None


class ModelOutput(NamedTuple):
  """What a forward returns.

  Attributes:
    logits: float32 [B,T,vocab], or None where not asked for.
    hidden: [B,T,D] after the final norm.
    cache: the new Cache, or None.
    dense: LayerResults of the dense layers, stacked, or None.
    moe: LayerResults of the MoE layers, stacked, or None.
    embedding: [B,T,D] where traced.
  """

  logits: jax.Array | None
  hidden: jax.Array
  cache: cache_lib.Cache | None
  dense: block_lib.LayerResults | None
  moe: block_lib.LayerResults | None
  embedding: jax.Array | None = None

  def gather(self, name: str):
    """Joins a result of all layers along L; None where no layer has it."""
    found = [getattr(r, name) for r in (self.dense, self.moe) if r is not None]
    found = [value for value in found if value is not None]
    return jnp.concatenate(found) if found else None


class Embedding(nnx.Module):
  """Token embeddings."""

  def __init__(self, config, *, rngs, dtype):
    self.table = layers.parameter(
      rngs,
      (config.vocab_size, config.width),
      ("vocab", "embed"),
      scale=config.initializer_scale,
      dtype=dtype,
    )

  def __call__(self, tokens_BT, dtype):
    """Returns x_BTD; each device looks its own tokens up in the whole table."""

    def look_up(table_VD, tokens_BT):
      rows_BTD = jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
      return (rows_BTD.astype(dtype),)

    (x_BTD,) = sharding.shard_call(
      look_up,
      (self.table[...], tokens_BT),
      (
        sharding.Gathered(("vocab", "embed"), (None, None), dtype),
        ("batch", "length"),
      ),
      (("batch", "length", None),),
    )
    return x_BTD


class Head(nnx.Module):
  """The untied output head."""

  def __init__(self, config, *, rngs, dtype):
    self.kernel = layers.parameter(
      rngs,
      (config.width, config.vocab_size),
      ("embed", "vocab"),
      scale=config.initializer_scale,
      dtype=dtype,
    )

  def __call__(self, hidden_BTD):
    """Returns float32 logits_BTV."""
    return jnp.einsum(
      "BTD,DV->BTV",
      hidden_BTD,
      self.kernel[...].astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )


class Transformer(nnx.Module):
  """The model. Parameters are stacked by kind of layer (see block.py)."""

  def __init__(
    self,
    config: config_lib.ModelConfig,
    *,
    rngs: nnx.Rngs,
    dtype=jnp.float32,
    compute_dtype=None,
  ):
    """Makes the model; see fresh.py for fresh weights without compilation.

    Args:
      config: its shape.
      rngs: source of the "params" key.
      dtype: type of the parameters.
      compute_dtype: type of activations and matmuls; default `dtype`.
    """
    self.config = config
    if compute_dtype is None:
      compute_dtype = dtype
    self.compute_dtype = jnp.dtype(compute_dtype)
    kwargs = dict(rngs=rngs, dtype=dtype)
    self.embed = Embedding(config, **kwargs)
    self.dense_layers = block_lib.stacked_blocks(
      config, config.num_dense_layers, is_moe=False, **kwargs
    )
    self.moe_layers = block_lib.stacked_blocks(
      config, config.num_moe_layers, is_moe=True, **kwargs
    )
    self.final_norm = layers.RMSNorm(
      config.width, epsilon=config.norm_epsilon, dtype=dtype
    )
    self.head = Head(config, **kwargs)
    self.mtp = (
      mtp_lib.MultiTokenPrediction(config, **kwargs)
      if config.num_mtp_layers
      else None
    )

  def __call__(
    self,
    tokens_BT,
    *,
    positions_BT=None,
    segments_BT=None,
    cache: cache_lib.Cache | None = None,
    options: attention_lib.AttentionOptions | None = None,
    replay: Replay = Replay(),
    order: token_order.TokenOrder | None = None,
    with_logits: bool = True,
    record: bool = False,
    trace: bool = False,
    remat=None,
  ) -> ModelOutput:
    """Runs the model on tokens, alone or behind what the cache holds.

    Args:
      tokens_BT: int32 token ids.
      positions_BT: int32 rotary positions; default: the place in the row.
      segments_BT: int32 documents, 0 for padding; tokens of different
        documents do not see each other. Default: one document, no padding.
      cache: appended to and returned, or None.
      options: selector and form; default DeepSeek Sparse Attention.
      replay: recorded choices to use.
      order: in which tokens, positions and segments are given and results come;
        None for their own. Not with a cache.
      with_logits: compute the logits at every position.
      record: report routing and selection for a replay.
      trace: report intermediates (for tests and captures).
      remat: rematerialisation of a layer: a function that wraps its step.
    """
    options = options or self.default_options()
    sequence, cache = self.describe(
      tokens_BT, positions_BT, segments_BT, cache, order
    )
    embedding_BTD = self.embed(tokens_BT, self.compute_dtype)

    def run(block, x_BTD, inputs):
      return block(x_BTD, sequence, options, inputs, record=record, trace=trace)

    dense_inputs, moe_inputs = self._layer_inputs(cache, replay)
    x_BTD, dense_cache, dense = block_lib.run_layers(
      self.dense_layers, embedding_BTD, dense_inputs, run, remat=remat
    )
    x_BTD, moe_cache, moe = block_lib.run_layers(
      self.moe_layers, x_BTD, moe_inputs, run, remat=remat
    )
    hidden_BTD = self.final_norm(x_BTD)
    if cache is not None:
      cache = cache._replace(
        dense=dense_cache,
        moe=moe_cache,
        length_B=cache.length_B + tokens_BT.shape[1],
      )
    return ModelOutput(
      logits=self.head(hidden_BTD) if with_logits else None,
      hidden=hidden_BTD,
      cache=cache,
      dense=dense,
      moe=moe,
      embedding=embedding_BTD if trace else None,
    )

  def default_options(self) -> attention_lib.AttentionOptions:
    """DeepSeek Sparse Attention with the config's number of keys."""
    return attention_lib.AttentionOptions(
      select=selection_lib.TopK(self.config.index_top_k)
    )

  def describe(self, tokens_BT, positions_BT, segments_BT, cache, order=None):
    """Returns the Sequence of new tokens, and the cache with their segments."""
    assert order is None or cache is None, "a cache has its own order"
    batch, length = tokens_BT.shape
    place_BT = jnp.broadcast_to(
      jnp.arange(length, dtype=jnp.int32), (batch, length)
    )
    held_B = None
    if cache is not None:
      held_B = cache.length_B
      place_BT = place_BT + held_B[:, None]
    key_segments_BS = segments_BT
    if order is not None:
      place_BT = order.apply(place_BT)
      if segments_BT is not None:
        key_segments_BS = order.restore(segments_BT)
    slots_BT = place_BT
    real_BT = jnp.ones((batch, length), bool)
    if segments_BT is not None:
      real_BT = segments_BT > 0
      slots_BT = jnp.where(real_BT, place_BT, -1)
      if cache is not None:
        held_BS = cache.segments_BS
        if held_BS is None:
          held_BS = jnp.zeros((batch, cache.capacity), jnp.int32)
        key_segments_BS = cache_lib.append(
          held_BS[..., None], segments_BT[..., None], held_B
        )[..., 0]
        cache = cache._replace(segments_BS=key_segments_BS)
    sight = selection_lib.Visibility(slots_BT, segments_BT, key_segments_BS)
    rotation = rope.rotation_tables(
      place_BT if positions_BT is None else positions_BT,
      self.config.rope_width,
      self.config.rope,
    )
    return block_lib.Sequence(rotation, sight, real_BT, held_B, order), cache

  def _layer_inputs(self, cache, replay: Replay):
    """Splits caches and replays between the dense and the MoE layers."""
    count, first = self.config.num_layers, self.config.num_dense_layers
    layer_L = jnp.arange(count, dtype=jnp.int32)
    chosen = replay.selection

    def inputs(part, held, experts):
      return block_lib.LayerInputs(
        layer=layer_L[part],
        cache=held,
        selection=None if chosen is None else chosen[part],
        experts_BTA=experts,
      )

    dense_cache = None if cache is None else cache.dense
    moe_cache = None if cache is None else cache.moe
    return (
      inputs(slice(0, first), dense_cache, None),
      inputs(slice(first, count), moe_cache, replay.experts),
    )

  def predict_further(
    self,
    output: ModelOutput,
    tokens_BT,
    *,
    options=None,
    positions_BT=None,
    segments_BT=None,
    order=None,
    remat=None,
    experts_BTA=None,
  ):
    """Runs the multi-token prediction module on a forward's output.

    Position i joins the hidden state of token i and token i + 1; the last
    position has no next token and its result means nothing.

    Args:
      output: of this model on the same tokens, without a cache.
      tokens_BT, positions_BT, segments_BT, order: as given to the forward.
      options: attention options; default DeepSeek Sparse Attention.
      remat: wraps the module for rematerialisation, or None.
      experts_BTA: recorded routing of the module to use, or None.

    Returns:
      hidden_BTD (for `self.head`) and LayerResults.

    Raises:
      ValueError: if the model has no such module.
    """
    if self.mtp is None:
      raise ValueError(f"num_mtp_layers={self.config.num_mtp_layers}: no MTP")
    options = options or self.default_options()
    sequence, _ = self.describe(
      tokens_BT, positions_BT, segments_BT, None, order
    )
    if order is None:
      next_BT = jnp.roll(tokens_BT, -1, axis=1)
    else:
      next_BT = order.apply(jnp.roll(order.restore(tokens_BT), -1, axis=1))
    inputs = block_lib.LayerInputs(
      layer=jnp.int32(self.config.num_layers), experts_BTA=experts_BTA
    )
    graph, state = nnx.split(self.mtp)

    def run(state, hidden_BTD, embedding_BTD):
      return nnx.merge(graph, state)(
        hidden_BTD, embedding_BTD, sequence, options, inputs
      )

    embedding_BTD = self.embed(next_BT, self.compute_dtype)
    run = run if remat is None else remat(run)
    hidden_BTD, _, results = run(state, output.hidden, embedding_BTD)
    return hidden_BTD, results

  def predict_behind(self, hidden_BTD, next_BT, held, length_B, options):
    """Runs the multi-token prediction module behind a cache of its own.

    Args:
      hidden_BTD: this model's hidden states of new tokens.
      next_BT: int32, the token that follows each.
      held: the module's PagedLayerCache or LayerCache of the tokens before.
      length_B: int32, how many it holds.
      options: attention options.

    Returns:
      hidden_BTD (for `self.head`), and the cache with the new tokens.
    """
    before = cache_lib.Cache(dense=None, moe=(held,), length_B=length_B)
    sequence, _ = self.describe(next_BT, None, None, before)
    inputs = block_lib.LayerInputs(
      layer=jnp.int32(self.config.num_layers), cache=held
    )
    embedding_BTD = self.embed(next_BT, self.compute_dtype)
    hidden_BTD, held, _ = self.mtp(
      hidden_BTD, embedding_BTD, sequence, options, inputs
    )
    return hidden_BTD, held

  def unstacked(self) -> "Transformer":
    """Returns a model whose layers run one by one, for decoding on a CPU.

    Its caches are made with `stacked=False`. It holds copies of the stacked
    parameters.
    """
    graph, state = nnx.split(self)
    model = nnx.merge(graph, state)
    model.dense_layers = block_lib.unstack(self.dense_layers)
    model.moe_layers = block_lib.unstack(self.moe_layers)
    return model
