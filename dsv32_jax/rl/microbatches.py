"""Gradients of a replay batch piece by piece, where it does not fit at once."""

import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.rl import logprobs
from dsv32_jax.rl import replay

# B batch, T tokens, M microbatches, L layers


def cut(batch: replay.ReplayBatch, microbatches: int) -> replay.ReplayBatch:
  """Gives each array a leading axis M over pieces of the rows.

  `num_sequences` stays that of the whole batch, which the losses divide by.

  Raises:
    ValueError: if the rows do not divide.
  """
  rows = batch.old_logp_BT.shape[0]
  if rows % microbatches:
    raise ValueError(f"{rows=} of the batch do not divide by {microbatches=}")

  def by_rows(x):
    pieces = x.reshape(microbatches, rows // microbatches, *x.shape[1:])
    rest = ("length", None)[: x.ndim - 1]
    return sharding.constrain(pieces, None, "batch", *rest)

  def by_layers(x):
    shape = (x.shape[0], microbatches, rows // microbatches, *x.shape[2:])
    pieces = jnp.moveaxis(x.reshape(shape), 1, 0)
    return sharding.constrain(pieces, None, None, "batch", "length", None)

  return replay.ReplayBatch(
    batch=jax.tree.map(by_rows, batch.batch),
    old_logp_BT=by_rows(batch.old_logp_BT),
    ref_logp_BT=by_rows(batch.ref_logp_BT),
    advantages_B=by_rows(batch.advantages_B),
    kl_weight_B=by_rows(batch.kl_weight_B),
    num_sequences=jnp.broadcast_to(batch.num_sequences, (microbatches,)),
    kept=logprobs.KeptSets(*jax.tree.map(by_rows, tuple(batch.kept))),
    experts_LBTA=jax.tree.map(by_layers, batch.experts_LBTA),
    selection_LBTS=jax.tree.map(by_layers, batch.selection_LBTS),
  )


def accumulate(gradient, trained, batch: replay.ReplayBatch, microbatches: int):
  """Sums gradients (float32), metrics and loads over the pieces.

  Args:
    gradient: of (trained, batch) to (gradients, (metrics, load_LE)), whose
      sums over pieces are those of the whole.
    trained: parameters.
    batch: whole.
    microbatches: pieces M.
  """
  if microbatches == 1:
    return gradient(trained, batch)
  pieces = cut(batch, microbatches)

  def in_float32(found):
    gradients, rest = found
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), rest

  def one(total, piece):
    found = in_float32(gradient(trained, piece))
    return jax.tree.map(jnp.add, total, found), None

  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(lambda *a: in_float32(gradient(*a)), trained, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(one, zeros, pieces)
  return total
