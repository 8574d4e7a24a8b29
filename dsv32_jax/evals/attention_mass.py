"""How much of the dense attention a selection of k keys would keep.

The share of a query's attention, averaged over heads, that lies on the selected
keys: of the indexer's choice, of chance, of the most recent keys, and of the
best k keys that anyone could pick (the k largest of the averaged attention).
"""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.model import attention
from dsv32_jax.model import selection
from dsv32_jax.model import transformer
from pallas_kernels import bitmask

# B batch, T queries, S keys, H heads, N nope width, R rotary width, C latent,
# W mask words, L layers, Q a block of queries

# Queries whose attention exists at once.
BLOCK = 128


def mean_attention(query_nope, query_rope, key_nope, key_rope, slot_Q, scale):
  """Dense causal attention of a block of queries, averaged over heads.

  Args:
    query_nope: [B,Q,H,N].
    query_rope: [B,Q,H,R].
    key_nope: [B,S,H,N].
    key_rope: [B,S,R], shared by the heads.
    slot_Q: the queries' places among the keys.
    scale: of the softmax.

  Returns:
    attention_BQS float32; a row sums to one.
  """
  logits_BHQS = jnp.einsum("BQHN,BSHN->BHQS", query_nope, key_nope)
  logits_BHQS += jnp.einsum("BQHR,BSR->BHQS", query_rope, key_rope)
  causal_QS = jnp.arange(key_nope.shape[1]) <= slot_Q[:, None]
  logits_BHQS = logits_BHQS.astype(jnp.float32) * scale
  logits_BHQS = jnp.where(causal_QS, logits_BHQS, -jnp.inf)
  return jnp.mean(jax.nn.softmax(logits_BHQS, axis=-1), axis=1)


def kept_mass(attention_BQS, masks: Mapping[str, jax.Array], top_k: int):
  """Sums attention over selected keys.

  Args:
    attention_BQS: averaged over heads.
    masks: packed selections [B,Q,W] by name.
    top_k: keys that `best`, added to the names, may pick.

  Returns:
    Dict of float32 [B,Q].
  """
  num_keys = attention_BQS.shape[-1]
  mass = {
    name: jnp.sum(
      jnp.where(bitmask.unpack(mask, num_keys), attention_BQS, 0), axis=-1
    )
    for name, mask in masks.items()
  }
  best_BQk, _ = jax.lax.top_k(attention_BQS, min(top_k, num_keys))
  return mass | {"best": jnp.sum(best_BQk, axis=-1)}


def make_measure(graph, selectors: Mapping[str, selection.Selector], top_k):
  """Returns a jitted function of (model state, tokens_BT) to kept mass.

  Args:
    graph: structure of the model.
    selectors: by name; each chooses at most top_k keys.
    top_k: keys of the best possible choice.

  Returns:
    The function; its result is a dict of float32 [L,B,T] by name, `best` among
    them. T must be a multiple of BLOCK, or below it.
  """

  @jax.jit
  def measure(state, tokens_BT):
    model = nnx.merge(graph, state)
    options = attention.AttentionOptions(select=selection.DENSE)
    output = model(tokens_BT, options=options, with_logits=False, trace=True)
    sight, _ = model.describe(tokens_BT, None, None, None)
    first, found = 0, []
    parts = (
      (model.dense_layers, output.dense),
      (model.moe_layers, output.moe),
    )
    for stack, results in parts:
      if results is None:
        continue
      layer_L = first + jnp.arange(len(results.trace["latent"]))
      first += len(results.trace["latent"])
      weights = nnx.state(stack.attention)
      per_layer = (weights, results.trace, layer_L)
      structure = nnx.split(stack.attention)[0]

      def one(args):
        weights, trace, layer = args
        layer_attention = nnx.merge(structure, weights)
        return _layer_mass(
          layer_attention, trace, layer, sight.sight, selectors, top_k
        )

      found.append(jax.lax.map(one, per_layer))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

  return measure


def _layer_mass(module, trace, layer, sight, selectors, top_k):
  """Kept mass [B,T] by name of one layer."""
  config = module.config
  masks = {
    name: select(
      trace["index"],
      trace["index"].key_BTK,
      sight,
      layer=layer,
      want_indices=False,
    ).mask_BTW
    for name, select in selectors.items()
  }
  query_nope = jnp.einsum(
    "BTU,UHN->BTHN",
    trace["query_latent"],
    module.query_up[..., : config.nope_width],
  )
  key_nope = jnp.einsum("BSC,CHN->BSHN", trace["latent"], module.key_up[...])
  length = query_nope.shape[1]
  block = min(BLOCK, length)
  assert length % block == 0, (length, block)

  def one(start):
    def cut(x):
      return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

    attention_BQS = mean_attention(
      cut(query_nope),
      cut(trace["query_rope"]),
      key_nope,
      trace["key_rope"],
      start + jnp.arange(block),
      config.softmax_scale,
    )
    return kept_mass(attention_BQS, jax.tree.map(cut, masks), top_k)

  starts = jnp.arange(0, length, block)
  found = jax.lax.map(one, starts)
  return {
    name: jnp.moveaxis(value, 0, 1).reshape(value.shape[1], length)
    for name, value in found.items()
  }


def measure(
  model: transformer.Transformer,
  tokens_RT: np.ndarray,
  run,
  *,
  top_k: int,
  batch_size: int,
  progress=lambda steps: steps,
) -> dict[str, np.ndarray]:
  """Measures the mass that selections keep of the model's dense attention.

  Args:
    model: any; its attention runs dense.
    tokens_RT: rows of one document each.
    run: of make_measure, for the structure of this model.
    top_k: as given to it; positions below see no more and are left
      out.
    batch_size: rows at a time.
    progress: wraps the iterable of steps.

  Returns:
    By name, `best` among them: float32 [L,R], means over positions top_k and
    later.

  Raises:
    ValueError: if rows have no position past top_k.
  """
  if tokens_RT.shape[1] <= top_k:
    raise ValueError(f"{tokens_RT.shape=} has no position past {top_k=}")
  state = nnx.state(model)
  parts = []
  for start in progress(range(0, len(tokens_RT), batch_size)):
    rows = tokens_RT[start : start + batch_size]
    filler = np.zeros((batch_size - len(rows), rows.shape[1]), np.int32)
    mass = jax.device_get(run(state, np.concatenate([rows, filler])))
    parts.append(
      {
        name: value[:, : len(rows), top_k:].mean(axis=-1)
        for name, value in mass.items()
      }
    )
  return {
    name: np.concatenate([part[name] for part in parts], axis=1)
    for name in parts[0]
  }
