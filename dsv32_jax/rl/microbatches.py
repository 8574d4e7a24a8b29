"""A replay batch in pieces, where its gradients do not fit at once."""

import jax
import jax.numpy as jnp

from dsv32_jax import sharding
from dsv32_jax.rl import logprobs
from dsv32_jax.rl import replay
from dsv32_jax.training import step

# B batch, T tokens, M microbatches, L layers


def cut(batch: replay.ReplayBatch, microbatches: int) -> replay.ReplayBatch:
  """Gives each array a leading axis M over pieces of the rows.

  `num_sequences` stays that of the whole batch, which the losses divide by.
  `replay.pack` has put all parts of a trajectory into one piece.

  Raises:
    ValueError: if the rows do not divide.
  """

  def by_rows(x):
    return step.cut_rows(x, microbatches)

  def by_layers(x):
    rows = step.rows_of_piece(x.shape[1], microbatches)
    shape = (x.shape[0], microbatches, rows, *x.shape[2:])
    pieces = jnp.moveaxis(x.reshape(shape), 1, 0)
    return sharding.constrain(pieces, None, None, "batch", "length", None)

  return replay.ReplayBatch(
    batch=jax.tree.map(by_rows, batch.batch),
    old_logp_BT=by_rows(batch.old_logp_BT),
    ref_logp_BT=by_rows(batch.ref_logp_BT),
    advantages_B=by_rows(batch.advantages_B),
    kl_weight_B=by_rows(batch.kl_weight_B),
    trajectory_B=by_rows(batch.trajectory_B),
    num_sequences=jnp.broadcast_to(batch.num_sequences, (microbatches,)),
    kept=logprobs.KeptSets(*jax.tree.map(by_rows, tuple(batch.kept))),
    experts_LBTA=jax.tree.map(by_layers, batch.experts_LBTA),
    selection_LBTS=jax.tree.map(by_layers, batch.selection_LBTS),
    order=batch.order,
  )
