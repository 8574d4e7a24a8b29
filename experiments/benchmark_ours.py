"""This project's side of the CPU benchmark, one row a process."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv32_jax import weights
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import selection
from dsv32_jax.training import losses
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.training import stages
from dsv32_jax.training import step as step_lib
from experiments import benchmark_parts
from experiments import stopwatch

# B batch, T tokens, S slots

# Tokens of one piece of a prefill before decoding.
PIECE = 1024


def measure(row, path, token_ids: np.ndarray) -> dict:
  """Times one row of the benchmark.

  Args:
    row: mapping with `job`, `variant` and `length`.
    path: Hugging Face folder.
    token_ids: int [1, length + tokens to decode].

  Returns:
    As stopwatch.measure; of the job `parts` a dict of milliseconds a layer.
  """
  model = weights.load_hf(path)
  token_ids = jnp.asarray(token_ids, jnp.int32)
  jobs = {
    "prefill": _prefill,
    "train": _train,
    "decode": _decode,
    "parts": benchmark_parts.measure,
  }
  return jobs[row["job"]](model, token_ids, row["length"], row["variant"])


def options(model, variant: str) -> attention.AttentionOptions:
  """Attention of a variant: the default, one form of it, or dense."""
  if variant == "dense":
    return attention.AttentionOptions(select=selection.DENSE)
  form = None if variant == "default" else variant
  select = selection.TopK(model.config.index_top_k)
  return attention.AttentionOptions(select=select, form=form)


def _prefill(model, token_ids, length, variant):
  graph, state = nnx.split(model)
  chosen = options(model, variant)

  @jax.jit
  def forward(state, tokens_BT):
    return nnx.merge(graph, state)(tokens_BT, options=chosen).logits

  tokens_BT = token_ids[:, :length]
  return stopwatch.measure(
    lambda: forward(state, tokens_BT).block_until_ready()
  )


def _train(model, token_ids, length, variant):
  """Of `sparse_stage` the whole step, else forward and backward of LM loss."""
  tokens_BT = np.asarray(token_ids[:, :length])
  ones_BT = np.ones_like(tokens_BT)
  batch = batch_lib.from_packed(
    tokens_BT, ones_BT, ones_BT, np.arange(length)[None]
  )
  if variant == "sparse_stage":
    config = optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=1e-5)
    )
    return _train_step(model, batch, optimizer.make_optimizer(config))
  chosen = options(model, variant)
  graph, trained, *rest = stages.partition(model, "model")

  @jax.jit
  def gradient(trained, rest, batch):
    def loss_of(trained):
      model = nnx.merge(graph, trained, *rest)
      output = model(batch.tokens_BT, options=chosen, with_logits=False)
      loss, _ = losses.lm_loss(
        output.hidden,
        model.head.kernel[...],
        batch.targets_BT,
        batch.loss_mask_BT,
        jnp.sum(batch.loss_mask_BT),
      )
      return loss

    return jax.value_and_grad(loss_of)(trained)

  return stopwatch.measure(
    lambda: jax.block_until_ready(gradient(trained, rest, batch))
  )


def _train_step(model, batch, transformation: optax.GradientTransformation):
  graph, state = step_lib.init_state(model, stages.SPARSE, transformation)
  del model
  # As a run places it: a state that is tied to no device compiles twice.
  state = jax.device_put(state, jax.devices()[0])
  step = step_lib.make_step(graph, stages.SPARSE, transformation)

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  return stopwatch.measure(run)


def _decode(model, token_ids, length, variant):
  """Decodes after a prefill by the stacked model, which compiles one layer."""
  chosen = options(model, variant)
  capacity = token_ids.shape[1]
  cache = cache_lib.empty_cache(model.config, 1, capacity)
  forward = _cached_forward(model, chosen)
  for start in range(0, length, PIECE):
    piece = token_ids[:, start : min(start + PIECE, length)]
    logits, cache = forward(piece, cache)
  logits.block_until_ready()
  cache = cache._replace(dense=_unstack(cache.dense), moe=_unstack(cache.moe))
  forward = _cached_forward(model.unstacked(), chosen)
  place = length

  def run():
    nonlocal cache, place
    logits, cache = forward(token_ids[:, place : place + 1], cache)
    logits.block_until_ready()
    place += 1

  return stopwatch.measure(run, runs=capacity - length - 1)


def _cached_forward(model, chosen):
  """Returns a function of tokens and the cache, which it overwrites."""
  graph, state = nnx.split(model)

  @functools.partial(jax.jit, donate_argnums=2)
  def forward(state, tokens_BT, cache):
    model = nnx.merge(graph, state)
    output = model(tokens_BT, cache=cache, options=chosen, with_logits=False)
    return model.head(output.hidden[:, -1:]), output.cache

  return functools.partial(forward, state)


def _unstack(held: cache_lib.LayerCache | None):
  """Turns the cache of stacked layers into a tuple of one a layer."""
  if held is None:
    return None
  count = held.latent_BSC.shape[0]
  return tuple(jax.tree.map(lambda x: x[i], held) for i in range(count))
