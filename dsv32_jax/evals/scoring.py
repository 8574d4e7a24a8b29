"""Logits of given tokens, in one forward or by prefill and decode."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.evals import captures
from dsv32_jax.model import attention
from dsv32_jax.model import cache as cache_lib
from dsv32_jax.model import transformer

# B batch, S sequence, V vocabulary


def check_token_ids(token_ids, vocab_size: int) -> np.ndarray:
  """Returns token ids as int32 [B,S].

  Raises:
    ValueError: if they are no [B,S] integers within the vocabulary.
  """
  token_ids = np.asarray(token_ids)
  if token_ids.ndim != 2 or token_ids.dtype.kind not in "iu":
    raise ValueError(
      f"token_ids has shape={token_ids.shape} dtype={token_ids.dtype}, want"
      " integers [B,S]"
    )
  if token_ids.size == 0:
    raise ValueError(f"token_ids is empty: shape={token_ids.shape}")
  low, high = int(token_ids.min()), int(token_ids.max())
  if low < 0 or high >= vocab_size:
    raise ValueError(
      f"token_ids spans {low} to {high}, outside the vocabulary of"
      f" {vocab_size=}"
    )
  return token_ids.astype(np.int32)


def score(
  model: transformer.Transformer,
  token_ids_BS: np.ndarray,
  options: attention.AttentionOptions,
  *,
  capture: bool = False,
  mtp: bool = False,
) -> dict[str, np.ndarray]:
  """Runs one forward.

  Returns:
    `logits` [B,S,V] float32; with capture every array of captures.py; with
    mtp `mtp_logits_postnorm` [B,S-1,V].

  Raises:
    ValueError: if a NaN among index scores left a selection empty.
  """
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, token_ids_BS):
    model = nnx.merge(graph, state)
    output = model(token_ids_BS, options=options, record=capture, trace=capture)
    arrays = {"logits": output.logits}
    if capture:
      arrays |= captures.forward_arrays(model, output)
    if mtp:
      hidden, _ = model.predict_further(output, token_ids_BS, options=options)
      arrays["mtp_logits_postnorm"] = model.head(hidden)[:, :-1]
    invalid = output.gather("invalid_BT")
    return arrays, jnp.zeros((), bool) if invalid is None else invalid.any()

  arrays, invalid = run(state, jnp.asarray(token_ids_BS))
  if invalid:
    raise ValueError("index scores have NaN: the weights are not finite")
  return {name: np.asarray(value) for name, value in arrays.items()}


def score_by_decoding(
  model: transformer.Transformer,
  token_ids_BS: np.ndarray,
  prefill_length: int,
  options: attention.AttentionOptions,
  *,
  capture: bool = False,
  progress=lambda steps: steps,
) -> dict[str, np.ndarray]:
  """Prefills N tokens and feeds the rest one at a time through the cache.

  Args:
    model: the model; its layers are unstacked here.
    token_ids_BS: every token.
    prefill_length: N, from 1 to S.
    options: selector and precision.
    capture: also return index scores and selections of the decoded tokens.
    progress: wraps the iterable of steps.

  Returns:
    `decode_logits` [B,S-N+1,V] of positions N-1 to S-1; with capture
    `decode_index_scores` and `decode_topk_mask` [L,B,S-N,S].
  """
  batch, length = token_ids_BS.shape
  if not 1 <= prefill_length <= length:
    raise ValueError(f"{prefill_length=} is not within 1 to {length}")
  unstacked = model.unstacked()
  graph, state = nnx.split(unstacked)
  cache = cache_lib.empty_cache(
    model.config, batch, length, dtype=model.compute_dtype, stacked=False
  )

  @functools.partial(jax.jit, donate_argnums=2)
  def run(state, tokens_BT, cache):
    model = nnx.merge(graph, state)
    output = model(tokens_BT, cache=cache, options=options, with_logits=False)
    return model.head(output.hidden[:, -1:])[:, 0], output.cache

  logits, cache = run(
    state, jnp.asarray(token_ids_BS[:, :prefill_length]), cache
  )
  logits = [np.asarray(logits)]
  traces = []
  trace = _tracer(graph, options, length) if capture else None
  for i in progress(range(prefill_length, length)):
    token_B1 = jnp.asarray(token_ids_BS[:, i : i + 1])
    if trace is not None:
      traces.append(jax.tree.map(np.asarray, trace(state, token_B1, cache)))
    last, cache = run(state, token_B1, cache)
    logits.append(np.asarray(last))
  arrays = {"decode_logits": np.stack(logits, axis=1)}
  if traces:
    scores, masks = zip(*traces)
    arrays["decode_index_scores"] = np.concatenate(scores, axis=2)
    arrays["decode_topk_mask"] = np.concatenate(masks, axis=2)
  return arrays


def _tracer(graph, options, num_keys):
  """Returns a jitted step that gives index scores and selection."""

  @jax.jit
  def run(state, tokens_BT, cache):
    output = nnx.merge(graph, state)(
      tokens_BT, cache=cache, options=options, record=True, trace=True
    )
    stack = lambda layers: jax.tree.map(lambda *x: jnp.stack(x), *layers)
    held = output.cache
    held = held._replace(
      dense=held.dense and stack(held.dense), moe=held.moe and stack(held.moe)
    )
    return captures.index_arrays(output._replace(cache=held), num_keys)

  return run
