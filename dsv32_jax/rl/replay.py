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
from dsv32_jax.model import transformer
from dsv32_jax.rl import logprobs

# B batch, T tokens, N tokens of a trajectory, L layers, A experts a token,
# S selected keys, K kept tokens

# Kept sets of so many words are bits, whatever they hold: a list may take fewer
# bytes, but each length of list is compiled anew.
_FEW_WORDS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
  """One answer with its prompt, as the sampler saw it.

  Attributes:
    token_ids_N: prompt, answer, and in agentic tasks what tools said.
    written_N: bool, the tokens that the policy drew.
    logp_N: the sampler's log-probability of each drawn token, under the
      distribution it drew from; elsewhere ignored.
    kept: a sorted id array (or None: no truncation) for each token, or None.
    experts_LNA: routing of the N - 1 tokens that the sampler ran through the
      model (the last one it only drew), or None.
    selection_LNS: selected keys of these, padded with -1, or None.
    domain: which KL weight applies.
  """

  token_ids_N: np.ndarray
  written_N: np.ndarray
  logp_N: np.ndarray
  kept: Sequence[np.ndarray | None] | None = None
  experts_LNA: np.ndarray | None = None
  selection_LNS: np.ndarray | None = None
  domain: str = ""

  def __post_init__(self):
    length = len(self.token_ids_N)
    if length < 2:
      raise ValueError(f"{length=} of a trajectory must be at least 2")
    for name in ("written_N", "logp_N", "kept"):
      value = getattr(self, name)
      if value is not None and len(value) != length:
        raise ValueError(f"len({name})={len(value)} differs from {length=}")
    for name in ("experts_LNA", "selection_LNS"):
      value = getattr(self, name)
      if value is not None and value.shape[1] != length - 1:
        raise ValueError(
          f"{name} has shape={value.shape}, whose second axis must be"
          f" {length - 1}: one less than the tokens"
        )
    if self.written_N[0]:
      raise ValueError("written_N[0] is True: the first token is given")
    written_logp = np.asarray(self.logp_N)[np.asarray(self.written_N, bool)]
    if not np.all(np.isfinite(written_logp) & (written_logp <= 1e-4)):
      raise ValueError("logp_N of a written token is no log-probability")
    self._check_kept()

  def _check_kept(self):
    for place, ids in enumerate(self.kept or ()):
      token = self.token_ids_N[place]
      if ids is not None and self.written_N[place] and token not in ids:
        raise ValueError(f"{place=}: {token=} is not in its own kept set")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayBatch:
  """Trajectories in rows of one length, one a row.

  Position t holds token t and everything about drawing token t + 1.

  Attributes:
    batch: tokens, targets, masks; `loss_mask_BT` is 1 where the policy drew
      the target.
    old_logp_BT: float32, the sampler's; 0 where the mask is 0.
    ref_logp_BT: float32, the reference's; zeros before it is scored.
    advantages_B: float32.
    kl_weight_B: float32.
    num_sequences: float32, rows that hold a trajectory.
    kept: the sets drawn from.
    experts_LBTA: uint8 or uint16 routing over the MoE layers, or None.
    selection_LBTS: int32 selected keys over all layers, or None.
  """

  batch: batch_lib.Batch
  old_logp_BT: np.ndarray | jax.Array
  ref_logp_BT: np.ndarray | jax.Array
  advantages_B: np.ndarray | jax.Array
  kl_weight_B: np.ndarray | jax.Array
  num_sequences: np.ndarray | jax.Array
  kept: logprobs.KeptSets
  experts_LBTA: np.ndarray | jax.Array | None = None
  selection_LBTS: np.ndarray | jax.Array | None = None

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
  trajectories: Sequence[Trajectory],
  advantages: Sequence[float],
  kl_weights: Sequence[float],
  config: config_lib.ModelConfig,
  *,
  num_rows: int,
  lengths: Sequence[int],
) -> ReplayBatch:
  """Puts trajectories into rows of the shortest length that holds them all.

  Few lengths mean few compilations. Rows beyond the trajectories are padding.

  Args:
    trajectories: at least one, at most num_rows.
    advantages: one each.
    kl_weights: one each.
    config: of the model; counts experts and vocabulary.
    num_rows: B.
    lengths: allowed T; a trajectory of N tokens needs N - 1 places.

  Raises:
    ValueError: if they do not fit, or do not record the same.
  """
  count = len(trajectories)
  if not 1 <= count <= num_rows:
    raise ValueError(f"{count=} of trajectories must be 1 to {num_rows=}")
  if not len(advantages) == len(kl_weights) == count:
    raise ValueError(
      f"{len(advantages)=} and {len(kl_weights)=} must be {count=}"
    )
  longest = max(len(t.token_ids_N) for t in trajectories) - 1
  fitting = [length for length in lengths if length >= longest]
  if not fitting:
    raise ValueError(f"{longest=} trajectory exceeds {max(lengths)=}")
  rows = _Rows(trajectories, (num_rows, min(fitting)))
  mask_BT = rows.fill("written_N", np.float32, shift=1)
  logp_BT = rows.fill("logp_N", np.float32, shift=1)
  pad = (0, num_rows - count)
  return ReplayBatch(
    batch=_token_batch(rows, mask_BT, config),
    old_logp_BT=np.where(mask_BT > 0, logp_BT, 0).astype(np.float32),
    ref_logp_BT=np.zeros_like(mask_BT),
    advantages_B=np.pad(np.asarray(advantages, np.float32), pad),
    kl_weight_B=np.pad(np.asarray(kl_weights, np.float32), pad),
    num_sequences=np.float32(count),
    kept=_pack_kept(rows, config.vocab_size),
    experts_LBTA=rows.fill_layers(
      "experts_LNA", np.uint8 if config.num_experts <= 256 else np.uint16, 0
    ),
    selection_LBTS=rows.fill_layers("selection_LNS", np.int32, -1),
  )


class _Rows:
  """Trajectories and the shape [B, T] they go into."""

  def __init__(self, trajectories, shape):
    self.trajectories = trajectories
    self.shape = shape

  def fill(self, name, dtype, *, shift):
    """A value a token; `shift` 1 takes those of the next token."""
    out_BT = np.zeros(self.shape, dtype)
    for row, trajectory in enumerate(self.trajectories):
      value_N = np.asarray(getattr(trajectory, name))
      places = len(value_N) - 1
      out_BT[row, :places] = value_N[shift : places + shift]
    return out_BT

  def fill_layers(self, name, dtype, padding):
    """A record over layers, or None where none was made."""
    given = [getattr(t, name) for t in self.trajectories]
    if all(value is None for value in given):
      return None
    if any(value is None for value in given):
      raise ValueError(f"some trajectories record {name}, some do not")
    if len({(value.shape[0], value.shape[2]) for value in given}) != 1:
      raise ValueError(f"{name} differs in shape between trajectories")
    layers, _, last = given[0].shape
    out = np.full((layers, *self.shape, last), padding, dtype)
    limits = np.iinfo(dtype)
    for row, value in enumerate(given):
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
  places = [len(t.token_ids_N) - 1 for t in rows.trajectories]
  segments_BT = np.zeros(rows.shape, np.int32)
  for row, count in enumerate(places):
    segments_BT[row, :count] = 1
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
    for row, trajectory in enumerate(rows.trajectories)
    for place, ids in enumerate(trajectory.kept or ())
    if ids is not None and trajectory.written_N[place]
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
  """Lays a batch on a mesh: rows over the batch's axes, tokens over context."""
  return jax.tree.map(jax.device_put, batch, layouts(batch, mesh))


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
    num_sequences=layout(batch.num_sequences),
    kept=logprobs.KeptSets(*(layout(x, *tokens, None) for x in batch.kept)),
    experts_LBTA=layout(batch.experts_LBTA, None, *tokens, None),
    selection_LBTS=layout(batch.selection_LBTS, None, *tokens, None),
  )
