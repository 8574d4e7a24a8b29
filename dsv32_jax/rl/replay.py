"""The one typed batch from rollout to learner.

It carries what the sampler did, so that training can do the same: its own
log-probabilities, the sets it drew from (keep sampling mask), the experts its
tokens went through (keep routing) and, if wished, the keys they attended to.

Bytes a token of the 671B model (`bytes_per_token` counts any batch): 28 of
ids, masks and log-probabilities; routing 464 (58 layers, 8 experts, uint8: 256
experts fit); a kept set 4 a kept id, or 16160 as bits, whichever is smaller
for the largest set of the batch; selection 499712 (61 layers, 2048 keys),
which is why it is off by default.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.data import batch as batch_lib
from dsv32_jax.model import config as config_lib
from dsv32_jax.model import token_order
from dsv32_jax.model import transformer
from dsv32_jax.rl import logprobs
from dsv32_jax.rl import trajectory

# B batch, T tokens, L layers, A experts a token, S selected keys, K kept tokens

# Kept sets of so many words are bits, whatever they hold: a list may take fewer
# bytes, but each length of list is compiled anew.
_FEW_WORDS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayBatch:
  """Trajectories in rows of one length, a part a row.

  Position t holds token t and everything about drawing token t + 1.

  Attributes:
    batch: tokens, targets, masks; `loss_mask_BT` is 1 where the policy drew
      the target.
    old_logp_BT: float32, the sampler's; 0 where the mask is 0.
    ref_logp_BT: float32, the reference's; zeros before it is scored.
    advantages_B: float32.
    kl_weight_B: float32.
    trajectory_B: int32, the number of the row's trajectory; -1 for padding.
    num_sequences: float32, trajectories.
    kept: the sets drawn from.
    experts_LBTA: uint8 or uint16 routing over the MoE layers, or None.
    selection_LBTS: int32 selected keys over all layers, or None.
    order: in which all that a token has lies along T; None for its own.
  """

  batch: batch_lib.Batch
  old_logp_BT: np.ndarray | jax.Array
  ref_logp_BT: np.ndarray | jax.Array
  advantages_B: np.ndarray | jax.Array
  kl_weight_B: np.ndarray | jax.Array
  trajectory_B: np.ndarray | jax.Array
  num_sequences: np.ndarray | jax.Array
  kept: logprobs.KeptSets
  experts_LBTA: np.ndarray | jax.Array | None = None
  selection_LBTS: np.ndarray | jax.Array | None = None
  order: token_order.TokenOrder | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  def replayed(self, *, routing: bool, selection: bool) -> transformer.Replay:
    """The recorded choices as the model takes them.

    Raises:
      ValueError: if one is asked for that was not recorded.
    """
    if routing and self.experts_LBTA is None:
      raise ValueError("keep_routing=True, but the rollout recorded no routing")
    if selection and self.selection_LBTS is None:
      raise ValueError(
        "replay_selection=True, but the rollout recorded no selection"
      )
    return transformer.Replay(
      selection=self.selection_LBTS if selection else None,
      experts=self.experts_LBTA.astype(np.int32) if routing else None,
    )


def pack(
  trajectories: Sequence[trajectory.Trajectory],
  advantages: Sequence[float],
  kl_weights: Sequence[float],
  config: config_lib.ModelConfig,
  *,
  num_rows: int,
  lengths: Sequence[int],
  pieces: int = 1,
) -> ReplayBatch:
  """Puts parts into rows of the shortest length that holds them all.

  Few lengths mean few compilations. Rows beyond the parts are padding.

  Args:
    trajectories: at least one, each with parts.
    advantages: one each.
    kl_weights: one each.
    config: of the model; counts experts and vocabulary.
    num_rows: B.
    lengths: allowed T; a part of N tokens needs N - 1 places.
    pieces: microbatches that the rows will be cut into; all parts of a
      trajectory come into one.

  Raises:
    ValueError: if they do not fit, or do not record the same.
  """
  count = len(trajectories)
  if not len(advantages) == len(kl_weights) == count:
    raise ValueError(
      f"{len(advantages)=} and {len(kl_weights)=} must be {count=}"
    )
  number_B = rows_of_parts(
    [len(one.parts) for one in trajectories], num_rows, pieces
  )
  if number_B is None:
    parts = sum(len(one.parts) for one in trajectories)
    raise ValueError(
      f"{count=} of trajectories with {parts=} must be at least 1 and fit into"
      f" {num_rows=} in {pieces=}"
    )
  rows = _Rows(trajectories, number_B, lengths)
  mask_BT = rows.fill("written_N", np.float32, shift=1)
  logp_BT = rows.fill("logp_N", np.float32, shift=1)
  return ReplayBatch(
    batch=_token_batch(rows, mask_BT, config),
    old_logp_BT=np.where(mask_BT > 0, logp_BT, 0).astype(np.float32),
    ref_logp_BT=np.zeros_like(mask_BT),
    advantages_B=rows.repeat(advantages),
    kl_weight_B=rows.repeat(kl_weights),
    trajectory_B=number_B,
    num_sequences=np.float32(count),
    kept=_pack_kept(rows, config.vocab_size),
    experts_LBTA=rows.fill_layers(
      "experts_LNA", np.uint8 if config.num_experts <= 256 else np.uint16, 0
    ),
    selection_LBTS=rows.fill_layers("selection_LNS", np.int32, -1),
  )


def rows_of_parts(
  counts: Sequence[int], num_rows: int, pieces: int
) -> np.ndarray | None:
  """Numbers the rows of a batch by the trajectory that they hold a part of.

  Args:
    counts: parts of each trajectory, at least one.
    num_rows: of the batch.
    pieces: of the rows, equally many in each; no trajectory is in two.

  Returns:
    int32 [num_rows], -1 where a row stays empty; None if they do not fit.
  """
  if not counts or min(counts) < 1:
    return None
  room = [num_rows // pieces] * pieces
  held: list[list[int]] = [[] for _ in range(pieces)]
  for number in sorted(range(len(counts)), key=lambda n: -counts[n]):
    fitting = [n for n in range(pieces) if room[n] >= counts[number]]
    if not fitting:
      return None
    room[fitting[0]] -= counts[number]
    held[fitting[0]] += [number] * counts[number]
  return np.array(
    [n for one, free in zip(held, room) for n in one + [-1] * free], np.int32
  )


class _Rows:
  """Parts, each with its row, and the shape [B, T] they go into."""

  def __init__(self, trajectories, number_B, lengths):
    waiting = {n: iter(one.parts) for n, one in enumerate(trajectories)}
    self.number_B = number_B
    self.parts = [
      (row, next(waiting[number]))
      for row, number in enumerate(number_B.tolist())
      if number >= 0
    ]
    longest = max(len(part.token_ids_N) for _, part in self.parts) - 1
    fitting = [length for length in lengths if length >= longest]
    if not fitting:
      raise ValueError(f"a part's {longest=} exceeds {max(lengths)=}")
    self.shape = (len(number_B), min(fitting))

  def repeat(self, values):
    """A value of each trajectory in each of its rows, 0 elsewhere."""
    return np.asarray([*values, 0.0], np.float32)[self.number_B]

  def fill(self, name, dtype, *, shift):
    """A value a token; `shift` 1 takes those of the next token."""
    out_BT = np.zeros(self.shape, dtype)
    for row, part in self.parts:
      value_N = np.asarray(getattr(part, name))
      places = len(value_N) - 1
      out_BT[row, :places] = value_N[shift : places + shift]
    return out_BT

  def fill_layers(self, name, dtype, padding):
    """A record over layers, or None where none was made."""
    given = [getattr(part, name) for _, part in self.parts]
    if all(value is None for value in given):
      return None
    if any(value is None for value in given):
      raise ValueError(f"some parts record {name}, some do not")
    if len({(value.shape[0], value.shape[2]) for value in given}) != 1:
      raise ValueError(f"{name} differs in shape between parts")
    layers, _, last = given[0].shape
    out = np.full((layers, *self.shape, last), padding, dtype)
    limits = np.iinfo(dtype)
    for (row, _), value in zip(self.parts, given):
      if value.min() < limits.min or value.max() > limits.max:
        raise ValueError(f"{name} holds ids outside {np.dtype(dtype).name}")
      out[:, row, : value.shape[1]] = value
    return out


def _token_batch(rows, mask_BT, config) -> batch_lib.Batch:
  tokens_BT = rows.fill("token_ids_N", np.int32, shift=0)
  targets_BT = rows.fill("token_ids_N", np.int32, shift=1)
  largest = max(tokens_BT.max(), targets_BT.max())
  if largest >= config.vocab_size:
    raise ValueError(f"token {largest} exceeds vocab_size={config.vocab_size}")
  segments_BT = np.zeros(rows.shape, np.int32)
  for row, part in rows.parts:
    segments_BT[row, : len(part.token_ids_N) - 1] = 1
  position_T = np.arange(rows.shape[1], dtype=np.int32)
  return batch_lib.Batch(
    tokens_BT=tokens_BT,
    targets_BT=targets_BT,
    loss_mask_BT=mask_BT,
    segments_BT=segments_BT,
    positions_BT=np.where(segments_BT > 0, position_T, 0),
  )


def _pack_kept(rows, vocab_size) -> logprobs.KeptSets:
  """Ids if the largest set takes fewer bytes so, and bits many; else bits."""
  placed = [
    (row, place - 1, np.asarray(ids, np.int64))
    for row, part in rows.parts
    for place, ids in enumerate(part.kept or ())
    if ids is not None and part.written_N[place]
  ]
  if not placed:
    return logprobs.KeptSets()
  for row, place, ids in placed:
    if ids.min() < 0 or ids.max() >= vocab_size:
      raise ValueError(f"{row=} {place=}: kept ids exceed {vocab_size=}")
  largest = max(len(ids) for _, _, ids in placed)
  # A power of two, so that few shapes are compiled.
  width, words = 1 << (largest - 1).bit_length(), math.ceil(vocab_size / 32)
  if words > _FEW_WORDS and width < words:
    ids_BTK = np.full((*rows.shape, width), -1, np.int32)
    for row, place, ids in placed:
      ids_BTK[row, place, : len(ids)] = ids
    return logprobs.KeptSets(ids_BTK=ids_BTK)
  bits_BTW = np.zeros((*rows.shape, words), np.uint32)
  for row, place, ids in placed:
    one = np.uint32(1) << (ids % 32).astype(np.uint32)
    np.bitwise_or.at(bits_BTW[row, place], ids // 32, one)
  return logprobs.KeptSets(bits_BTW=bits_BTW)


def bytes_per_token(batch: ReplayBatch) -> dict[str, float]:
  """Bytes that each part of a batch takes, over its B * T places."""
  places = batch.batch.tokens_BT.size
  parts = {
    "tokens": (batch.batch, batch.old_logp_BT, batch.ref_logp_BT),
    "kept": batch.kept,
    "routing": batch.experts_LBTA,
    "selection": batch.selection_LBTS,
  }
  return {
    name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
    / places
    for name, part in parts.items()
  }


def place(batch: ReplayBatch, mesh: jax.sharding.Mesh) -> ReplayBatch:
  """Lays a batch on a mesh: rows over the batch's axes, tokens over context.

  Where context splits a row its tokens come into the order that balances causal
  work: here, on the host, since a device would need whole rows for that.
  """
  with jax.set_mesh(mesh):
    order = token_order.balanced(batch.batch.tokens_BT.shape[1])
  if order is not None:
    batch = _reordered(batch, order)
  return jax.tree.map(jax.device_put, batch, layouts(batch, mesh))


def _reordered(batch: ReplayBatch, order) -> ReplayBatch:
  assert batch.order is None, "the batch has an order"
  places_T = order.places(batch.batch.tokens_BT.shape[1])

  def by_rows(x_BTX):
    return np.take(x_BTX, places_T, axis=1)

  def by_layers(x_LBTX):
    return np.take(x_LBTX, places_T, axis=2)

  return dataclasses.replace(
    batch,
    batch=jax.tree.map(by_rows, batch.batch),
    old_logp_BT=by_rows(batch.old_logp_BT),
    ref_logp_BT=by_rows(batch.ref_logp_BT),
    kept=jax.tree.map(by_rows, batch.kept),
    experts_LBTA=jax.tree.map(by_layers, batch.experts_LBTA),
    selection_LBTS=jax.tree.map(by_layers, batch.selection_LBTS),
    order=order,
  )


def layouts(batch: ReplayBatch, mesh: jax.sharding.Mesh) -> ReplayBatch:
  """The sharding of each array of a batch, or of shapes of one."""

  def layout(value, *axes):
    if value is None:
      return None
    spec = sharding.partition_spec(value.shape, axes, mesh)
    return jax.sharding.NamedSharding(mesh, spec)

  rows, tokens = ("batch",), ("batch", "length")
  return ReplayBatch(
    batch=jax.tree.map(lambda x_BT: layout(x_BT, *tokens), batch.batch),
    old_logp_BT=layout(batch.old_logp_BT, *tokens),
    ref_logp_BT=layout(batch.ref_logp_BT, *tokens),
    advantages_B=layout(batch.advantages_B, *rows),
    kl_weight_B=layout(batch.kl_weight_B, *rows),
    trajectory_B=layout(batch.trajectory_B, *rows),
    num_sequences=layout(batch.num_sequences),
    kept=logprobs.KeptSets(*(layout(x, *tokens, None) for x in batch.kept)),
    experts_LBTA=layout(batch.experts_LBTA, None, *tokens, None),
    selection_LBTS=layout(batch.selection_LBTS, None, *tokens, None),
    order=batch.order,
  )
