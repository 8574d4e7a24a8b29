"""Rollouts of a tiny model, sampled by its plain forward, for tests."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.rl import replay
from dsv32_jax.rl import trajectory
from tests.support import models

# B batch, T tokens, V vocabulary

PROMPT = 4


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, tokens_BT):
  output = nnx.merge(graph, state)(
    tokens_BT, segments_BT=jnp.ones_like(tokens_BT), record=True
  )
  words_LBTW = output.gather("selection")
  return output.logits, output.moe.experts_BTA, words_LBTW


def forward(model):
  """A function of tokens_BT to (logits_BTV, experts_LBTA, words_LBTW)."""
  graph, state = nnx.split(model)
  return lambda tokens_BT: jax.device_get(_run(graph, state, tokens_BT))


def nucleus(logits_V, top_p):
  """The most likely ids that hold top_p, sorted, by numpy in float64."""
  chance_V = np.exp(np.float64(logits_V) - logits_V.max())
  chance_V /= chance_V.sum()
  order = np.argsort(-chance_V, kind="stable")
  before = np.cumsum(chance_V[order]) - chance_V[order]
  return np.sort(order[before < top_p])


def selected_keys(words_LBTW, top_k):
  """Lists of the keys in packed masks, padded with -1; lists stay lists."""
  if words_LBTW.dtype == np.int32:
    return words_LBTW
  keys = np.full((*words_LBTW.shape[:-1], top_k), -1, np.int32)
  for place in np.ndindex(keys.shape[:-1]):
    words_W = words_LBTW[place]
    found = [
      s for s in range(32 * len(words_W)) if words_W[s // 32] >> s % 32 & 1
    ]
    keys[place][: len(found)] = found
  return keys


def rollout(model, *, rows=4, length=13, top_p=1.0, temperature=1.0, seed=0):
  """Samples trajectories of `length` tokens and what a sampler records.

  Returns:
    A list of Trajectory.
  """
  generator = np.random.default_rng(seed)
  run = forward(model)
  tokens_BT = np.array(models.random_tokens((rows, length), seed=seed))
  logp_BT = np.zeros((rows, length))
  kept = [[None] * length for _ in range(rows)]
  for place in range(PROMPT, length):
    logits_BTV, *_ = run(tokens_BT)
    for row in range(rows):
      logits_V = np.float64(logits_BTV[row, place - 1]) / temperature
      ids = nucleus(logits_V, top_p)
      chance = np.exp(logits_V[ids] - logits_V[ids].max())
      chance /= chance.sum()
      drawn = generator.choice(len(ids), p=chance)
      tokens_BT[row, place] = ids[drawn]
      logp_BT[row, place] = np.log(chance[drawn])
      kept[row][place] = ids if top_p < 1 else None
  _, experts_LBTA, words_LBTW = run(tokens_BT)
  selection_LBTS = selected_keys(words_LBTW, model.config.index_top_k)
  return [
    of_one_part(
      token_ids_N=tokens_BT[row],
      written_N=np.arange(length) >= PROMPT,
      logp_N=logp_BT[row],
      kept=kept[row],
      experts_LNA=experts_LBTA[:, row, :-1],
      selection_LNS=selection_LBTS[:, row, :-1],
    )
    for row in range(rows)
  ]


def of_one_part(*, domain="", **fields):
  """A trajectory whose context only grew."""
  return trajectory.Trajectory(
    parts=(trajectory.Part(**fields),), domain=domain
  )


def pack(trajectories, config, *, advantages=None, kl_weight=0.05, rows=None):
  """One batch of all trajectories, in rows of their length."""
  count = len(trajectories)
  if advantages is None:
    advantages = np.resize([1.0, -1.0], count)
  return replay.pack(
    trajectories,
    advantages,
    [kl_weight] * count,
    config,
    num_rows=rows or count,
    lengths=(len(trajectories[0].parts[0].token_ids_N) - 1,),
  )
