"""A transformer block, and how a stack of equal blocks runs.

Blocks of a kind are stacked along a leading layer axis and scanned, so that
compile time does not depend on their number. Unstacked blocks (see
`Transformer.unstacked`) run one after the other: no layer's weights are
copied out of a stack, which a decoding CPU would feel.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.model import attention as attention_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import cost_rule
from dsv32_jax.model import layers
from dsv32_jax.model import mla
from dsv32_jax.model import moe
from dsv32_jax.model import selection as selection_lib
from dsv32_jax.model import token_order

# B batch, T tokens, D model width, E experts, A experts a token, L layers


class Sequence(NamedTuple):
  """What every layer needs to know of the tokens.

  Attributes:
    rotation: cos and sin tables.
    sight: visibility of the queries.
    real_BT: bool, False on padding.
    length_B: int32 tokens in the cache before these, or None.
    order: in which the tokens lie; None for their own.
  """

  rotation: tuple
  sight: selection_lib.Visibility
  real_BT: jax.Array
  length_B: jax.Array | None
  order: token_order.TokenOrder | None = None


class LayerInputs(NamedTuple):
  """What one layer gets for itself; stacked along L for a scanned stack.

  Attributes:
    layer: int32 number of the layer.
    cache: LayerCache or None.
    selection: recorded selection to replay, words or indices, or None.
    experts_BTA: recorded routing to replay, or None.
  """

  layer: jax.Array
  cache: object = None
  selection: jax.Array | None = None
  experts_BTA: jax.Array | None = None


class LayerResults(NamedTuple):
  """What one layer reports; a leading L axis after a stack.

  Attributes:
    kl_BT: float32 KL of the indexer to the attention, or None.
    balance: scalar sequence-wise balance loss, or None in a dense layer.
    load_E: int32 real tokens each expert got, or None.
    invalid_BT: True where a NaN left the selection empty, or None.
    experts_BTA: the routing, where recorded.
    selection: the selection, words or indices, where recorded.
    trace: dict of intermediates, where traced.
  """

  kl_BT: jax.Array | None
  balance: jax.Array | None
  load_E: jax.Array | None
  invalid_BT: jax.Array | None
  experts_BTA: jax.Array | None
  selection: jax.Array | None
  trace: dict | None


class Block(nnx.Module):
  """Attention and feed-forward with pre-norms and residuals."""

  def __init__(
    self, config: config_lib.ModelConfig, *, is_moe: bool, rngs, dtype
  ):
    norm = dict(epsilon=config.norm_epsilon, dtype=dtype)
    self.attention_norm = layers.RMSNorm(config.width, **norm)
    self.attention = mla.LatentAttention(config, rngs=rngs, dtype=dtype)
    self.ffn_norm = layers.RMSNorm(config.width, **norm)
    if is_moe:
      self.ffn = moe.MoE(config, rngs=rngs, dtype=dtype)
    else:
      self.ffn = layers.Mlp(
        config.width,
        config.ffn_width,
        rngs=rngs,
        scale=config.initializer_scale,
        dtype=dtype,
      )

  def __call__(
    self,
    x_BTD,
    sequence: Sequence,
    options: attention_lib.AttentionOptions,
    inputs: LayerInputs,
    *,
    record: bool = False,
    trace: bool = False,
  ):
    """Runs the block.

    Args:
      x_BTD: residual stream.
      sequence: of these tokens.
      options: how the attention runs.
      inputs: this layer's own.
      record: return the routing and the selection, for replay.
      trace: return intermediates.

    Returns:
      x_BTD, the layer's new cache (or None) and LayerResults.
    """
    x_BTD = sharding.constrain(x_BTD, "batch", "length", None)
    normed_BTD = self.attention_norm(x_BTD)
    attended_BTD, cache, found = self.attention(
      normed_BTD,
      sequence.rotation,
      sequence.sight,
      options,
      layer=inputs.layer,
      cache=inputs.cache,
      length_B=sequence.length_B,
      order=sequence.order,
      replay=inputs.selection,
    )
    x_BTD = x_BTD + attended_BTD
    normed_BTD = self.ffn_norm(x_BTD)
    routing = None
    if isinstance(self.ffn, moe.MoE):
      ffn_BTD, routing = self.ffn(
        normed_BTD,
        inputs.experts_BTA,
        implementation=cost_rule.choose_experts(options),
      )
    else:
      ffn_BTD = self.ffn(normed_BTD)
    x_BTD = sharding.constrain(x_BTD + ffn_BTD, "batch", "length", None)
    traced = None
    if trace:
      traced = found["trace"] | dict(
        attention=attended_BTD, ffn=ffn_BTD, residual=x_BTD, routing=routing
      )
    results = _results(found, routing, sequence.real_BT, record, traced)
    return x_BTD, cache, results


def _results(found, routing, real_BT, record, traced) -> LayerResults:
  chosen = found["selection"]
  kept = None
  if record and chosen is not None:
    kept = chosen.mask_BTW
    if chosen.indices_BTN is not None:
      kept = chosen.indices_BTN
  balance = load_E = None
  if routing is not None:
    balance = moe.balance_loss(routing, real_BT)
    load_E = moe.expert_load(
      routing.experts_BTA, real_BT, routing.affinities_BTE.shape[-1]
    )
  return LayerResults(
    kl_BT=found["kl_BT"],
    balance=balance,
    load_E=load_E,
    invalid_BT=None if chosen is None else chosen.invalid_BT,
    experts_BTA=routing.experts_BTA if record and routing else None,
    selection=kept,
    trace=traced,
  )


def stacked_blocks(config, count: int, *, is_moe: bool, rngs, dtype):
  """Makes `count` blocks as one Block with a leading layer axis, or None."""
  if count == 0:
    return None

  @nnx.split_rngs(splits=count)
  @nnx.vmap(in_axes=0, out_axes=0)
  def make(rngs):
    return Block(config, is_moe=is_moe, rngs=rngs, dtype=dtype)

  return make(rngs)


def unstack(stack: Block | None):
  """Turns a stacked Block into a list of blocks."""
  if stack is None:
    return None
  graph, state = nnx.split(stack)
  count = jax.tree.leaves(state)[0].shape[0]
  return nnx.List(
    nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))
    for i in range(count)
  )


def run_layers(blocks, x_BTD, inputs: LayerInputs, run, *, remat=None):
  """Runs a stack, or a list of blocks, over x.

  Args:
    blocks: stacked Block, nnx.List of Block, or None.
    x_BTD: residual stream.
    inputs: LayerInputs with a leading layer axis on each array; where the
      blocks are a list, `cache` is a tuple of one LayerCache a layer.
    run: function of (block, x_BTD, LayerInputs) to (x_BTD, cache, results).
    remat: function that wraps a layer for rematerialisation, or None.

  Returns:
    x_BTD, the caches (stacked or a tuple) and stacked LayerResults.
  """
  if blocks is None:
    return x_BTD, None, None
  if isinstance(blocks, nnx.List):
    return _run_list(blocks, x_BTD, inputs, run)
  graph, state = nnx.split(blocks)

  def step(x_BTD, per_layer):
    state, inputs = per_layer
    x_BTD, cache, results = run(nnx.merge(graph, state), x_BTD, inputs)
    return x_BTD, (cache, results)

  if remat is not None:
    step = remat(step)
  x_BTD, (cache, results) = jax.lax.scan(step, x_BTD, (state, inputs))
  return x_BTD, cache, results


def _run_list(blocks, x_BTD, inputs, run):
  caches, results = [], []
  for i, one in enumerate(blocks):
    # The caches are a tuple already: indexing it copies nothing.
    mine = jax.tree.map(lambda leaf: leaf[i], inputs._replace(cache=None))
    cache = None if inputs.cache is None else inputs.cache[i]
    x_BTD, cache, result = run(one, x_BTD, mine._replace(cache=cache))
    caches.append(cache)
    results.append(result)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
  return x_BTD, tuple(caches) if caches[0] is not None else None, stacked
