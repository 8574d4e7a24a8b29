"""Where a layer's time goes: its parts, each jitted and timed alone."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dsv32_jax.model import attention
from dsv32_jax.model import forms
from dsv32_jax.model import moe
from dsv32_jax.model import rope
from dsv32_jax.model import selection
from experiments import stopwatch

# B batch, T tokens, D model width, H heads, V value width, N selected keys

FORMS = ("expanded", "absorbed", "gathered")


def measure(model, token_ids, length: int, variant: str) -> dict:
  """Times the parts of the first MoE layer on `length` tokens.

  Args:
    model: stacked, with at least one MoE layer.
    token_ids: int32 [1, length or more].
    length: tokens T.
    variant: `all`, or the name of one part.

  Returns:
    `milliseconds` and `cpu_milliseconds` (of all threads) by part, and
    stopwatch's peak_rss_bytes.
  """
  graph, state = nnx.split(model.moe_layers)
  block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
  x_BTD = model.embed(token_ids[:, :length], jnp.float32) * 50
  parts = dict(_parts(model, block, x_BTD))
  chosen = parts if variant == "all" else {variant: parts[variant]}
  milliseconds, cpu_milliseconds, found = {}, {}, {}
  for name, run in chosen.items():
    found = stopwatch.measure(run, runs=3, budget=10)
    milliseconds[name] = 1000 * found["seconds"]
    cpu_milliseconds[name] = 1000 * found["cpu_seconds"]
  return {
    "milliseconds": milliseconds,
    "cpu_milliseconds": cpu_milliseconds,
    "peak_rss_bytes": found["peak_rss_bytes"],
  }


def _parts(model, block, x_BTD):
  """Yields (name, function to time); what one makes the next ones use."""
  config, layer = model.config, block.attention
  normed_BTD = block.attention_norm(x_BTD)
  length = x_BTD.shape[1]
  position_BT = jnp.arange(length, dtype=jnp.int32)[None]
  sight = selection.Visibility(position_BT, None, None)
  rotation = rope.rotation_tables(position_BT, config.rope_width, config.rope)

  def project(layer, x_BTD):
    down_BTU, both_BTC = layer.project_down(x_BTD)
    query_latent_BTU, *query = layer.project_query(down_BTU, rotation)
    latent = layer.project_latent(both_BTC, rotation)
    index = layer.indexer(x_BTD, query_latent_BTU, *rotation, quantized=False)
    return query, latent, index

  yield "projections", _timed(project, layer, normed_BTD)
  (query, latent, index) = jax.jit(_stateless(project, layer))(normed_BTD)
  projected = forms.Projected(
    *query, *latent, layer.key_up[...], layer.value_up[...]
  )
  select = selection.TopK(config.index_top_k)
  keys = {}
  for name, form in (("mask", "expanded"), ("indices", "gathered")):
    options = attention.AttentionOptions(select=select, form=form)

    def choose(index, options=options, form=form):
      return attention.select(
        *(options, form, index, index.key_BTK, sight),
        layer=jnp.int32(0),
        replay=None,
      )

    keys[name] = jax.jit(choose)(index)
    yield f"select_{name}", _timed_plain(choose, index)
  yield from _attention_parts(config, select, projected, keys, sight, index)
  yield from _ffn_parts(model, block, x_BTD)


def _attention_parts(config, select, projected, keys, sight, index):
  for form in (*FORMS, "dense"):
    dense = form == "dense"
    options = attention.AttentionOptions(
      select=selection.DENSE if dense else select
    )
    chosen = None
    if not dense:
      chosen = keys["indices" if form == "gathered" else "mask"]

    def attend(projected, chosen, options=options, form=form):
      return attention.attend(
        *(options, "expanded" if form == "dense" else form, projected),
        *(chosen, sight, index, index.key_BTK),
        scale=config.softmax_scale,
      )[0]

    def gradient(projected, chosen, attend=attend):
      return jax.grad(lambda p: jnp.sum(attend(p, chosen)))(projected)

    yield f"attention_{form}", _timed_plain(attend, projected, chosen)
    yield (
      f"attention_{form}_gradient",
      _timed_plain(gradient, projected, chosen),
    )
  yield from _loss_parts(config, select, projected, keys, sight, index)


def _loss_parts(config, select, projected, keys, sight, index):
  """Attention with the indexer's KL and its gradient to the indexer."""
  for form in ("expanded", "gathered"):
    options = attention.AttentionOptions(select=select, indexer_loss=True)
    chosen = keys["indices" if form == "gathered" else "mask"]

    def loss(index, projected, chosen, options=options, form=form):
      kl_BT = attention.attend(
        *(options, form, projected, chosen, sight, index, index.key_BTK),
        scale=config.softmax_scale,
      )[1]
      return jnp.sum(kl_BT)

    run = _timed_plain(jax.grad(loss), index, projected, chosen)
    yield f"attention_{form}_and_kl_gradient", run


def _ffn_parts(model, block, x_BTD):
  config, ffn = model.config, block.ffn
  normed_BTD = block.ffn_norm(x_BTD)

  def route(ffn, x_BTD):
    return moe.route(x_BTD, ffn.router[...], ffn.expert_bias[...], config)

  def experts(ffn, x_BTD, routing):
    weights = (ffn.gate[...], ffn.up[...], ffn.down[...])
    return moe.routed_experts(x_BTD, routing, *weights)

  routing = jax.jit(_stateless(route, ffn))(normed_BTD)
  values_BTHV = jnp.ones(
    (*x_BTD.shape[:2], config.num_heads, config.value_width)
  )

  def output(layer, values_BTHV):
    return jnp.einsum("BTHV,HVD->BTD", values_BTHV, layer.output[...])

  yield "attention_output", _timed(output, block.attention, values_BTHV)
  yield "router", _timed(route, ffn, normed_BTD)
  yield "routed_experts", _timed(experts, ffn, normed_BTD, routing)
  yield (
    "routed_experts_gradient",
    _timed_gradient(experts, ffn, normed_BTD, routing),
  )
  yield "shared_expert", _timed(lambda m, x: m(x), ffn.shared, normed_BTD)
  yield "head", _timed(lambda m, x: m(x), model.head, normed_BTD)


def _stateless(function, module):
  """Binds a module as constants of the jitted function."""
  return lambda *args: function(module, *args)


def _timed(function, module, *args) -> Callable[[], Any]:
  """Jits function(module, *args) with the module's state as an argument."""
  graph, state = nnx.split(module)
  compiled = jax.jit(
    lambda state, *args: function(nnx.merge(graph, state), *args)
  )
  return lambda: jax.block_until_ready(compiled(state, *args))


def _timed_gradient(function, module, *args) -> Callable[[], Any]:
  """As _timed, of the gradient to the module's parameters and inputs."""
  graph, trained, rest = nnx.split(module, nnx.Param, ...)

  def loss(trained, x_BTD, *args):
    return jnp.sum(function(nnx.merge(graph, trained, rest), x_BTD, *args))

  return _timed_plain(jax.grad(loss, argnums=(0, 1)), trained, *args)


def _timed_plain(function, *args) -> Callable[[], Any]:
  compiled = jax.jit(function)
  return lambda: jax.block_until_ready(compiled(*args))
