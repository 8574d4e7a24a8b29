"""The order in which a row's tokens lie, so that causal work is balanced.

Split among devices in its own order, a row's last queries see the most keys:
where tiles of hidden keys are skipped, the last device works twice as long as
the mean. So a row for n devices is cut into 2n pieces, and device i holds piece
i and piece 2n - 1 - i. Keys, which are gathered anyway, are put back in their
own order, so slots, masks and indices mean what they mean everywhere.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dsv32_jax import sharding

# B batch, T tokens, N devices, P tokens of a piece, X any other axes


@dataclasses.dataclass(frozen=True)
class TokenOrder:
  """Front pieces, each followed by its mirror image from the end.

  Attributes:
    shards: devices N that split a row.
  """

  shards: int

  def apply(self, x_BTX):
    """Puts tokens in this order along axis 1, which 2 N divides.

    Every device of a row sees it whole: for numbers of a token, not vectors.
    """
    x_BTX = _whole(x_BTX)
    batch, length, *rest = x_BTX.shape
    halves = x_BTX.reshape(batch, 2, self.shards, -1, *rest)
    front_BNPX, back_BNPX = halves[:, 0], halves[:, 1, ::-1]
    both = jnp.stack([front_BNPX, back_BNPX], axis=2)
    moved_BTX = both.reshape(batch, length, *rest)
    axes = ("batch", "length", *(None for _ in rest))
    return sharding.constrain(moved_BTX, *axes)

  def places(self, length: int) -> np.ndarray:
    """Where in a row each token of this order comes from, on the host."""
    halves = np.arange(length).reshape(2, self.shards, -1)
    return np.stack([halves[0], halves[1, ::-1]], axis=1).reshape(-1)

  def restore(self, x_BTX):
    """Undoes `apply`; every device of a row gets it whole."""
    return self.restore_whole(_whole(x_BTX))

  def restore_whole(self, x_BTX):
    """Undoes `apply` of a whole row, as a device has it inside shard_call."""
    batch, length, *rest = x_BTX.shape
    pairs = x_BTX.reshape(batch, self.shards, 2, -1, *rest)
    front_BNPX, back_BNPX = pairs[:, :, 0], pairs[:, ::-1, 1]
    both = jnp.concatenate([front_BNPX, back_BNPX], axis=1)
    return both.reshape(batch, length, *rest)


def _whole(x_BTX):
  return sharding.constrain(x_BTX, "batch", *(None,) * (x_BTX.ndim - 1))


def balanced(length: int) -> TokenOrder | None:
  """Returns the order for rows on the mesh in use; None for their own."""
  shards = sharding.num_shards("queries")
  if shards == 1 or length % (2 * shards):
    return None
  return TokenOrder(shards)
