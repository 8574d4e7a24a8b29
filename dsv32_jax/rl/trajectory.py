"""What was sampled, as the sampler saw it: trajectories and their parts."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from dsv32_jax.agents import token_stream
from dsv32_jax.generation import requests

# N tokens of a part, L layers, A experts a token, S selected keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """What the sampler saw and drew while its context only grew.

  Attributes:
    token_ids_N: prompt, answer, and in agentic tasks what tools said.
    written_N: bool, the tokens that the policy drew.
    logp_N: the sampler's log-probability of each drawn token, under the
      distribution it drew from; elsewhere ignored.
    kept: a sorted id array (or None: no truncation) for each token, or None.
    experts_LNA: routing of the N - 1 tokens that the sampler ran through the
      model (the last one it only drew), or None.
    selection_LNS: selected keys of these, padded with -1, or None.
  """

  token_ids_N: np.ndarray
  written_N: np.ndarray
  logp_N: np.ndarray
  kept: Sequence[np.ndarray | None] | None = None
  experts_LNA: np.ndarray | None = None
  selection_LNS: np.ndarray | None = None

  def __post_init__(self):
    length = len(self.token_ids_N)
    if length < 2:
      raise ValueError(f"{length=} of a part must be at least 2")
    ids_N = np.asarray(self.token_ids_N)
    if not np.issubdtype(ids_N.dtype, np.integer) or np.min(ids_N) < 0:
      raise ValueError("token_ids_N holds what is no token id")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
  """An answer, or an episode: what one advantage is for.

  Attributes:
    parts: one, or several where the context was rewritten on the way; none
      where nothing was drawn.
    domain: which KL weight applies.
  """

  parts: tuple[Part, ...]
  domain: str = ""


def from_completion(
  completion: requests.Completion, *, domain: str = ""
) -> Trajectory:
  """Makes the trajectory of an answer: prompt given, answer written.

  Raises:
    ValueError: if nothing was drawn, or with penalties or biases.
  """
  given, drawn = len(completion.prompt_ids), len(completion.token_ids)
  if not drawn:
    raise ValueError(f"request {completion.request_id!r} drew no token")
  _require_replayable(completion)
  kept = None
  if any(ids is not None for ids in completion.kept):
    kept = [None] * given + list(completion.kept)
  part = Part(
    token_ids_N=np.array([*completion.prompt_ids, *completion.token_ids]),
    written_N=np.arange(given + drawn) >= given,
    logp_N=np.array([0.0] * given + list(completion.logprobs)),
    kept=kept,
    experts_LNA=completion.experts_LNA,
    selection_LNS=completion.selection_LNS,
  )
  return Trajectory(parts=(part,), domain=domain)


def _require_replayable(completion: requests.Completion) -> None:
  if completion.adjusted:
    raise ValueError(
      f"request {completion.request_id!r} was drawn with a presence_penalty,"
      " frequency_penalty or logit_bias: no learner can replay it"
    )


def from_parts(
  parts: Sequence[token_stream.Part], *, domain: str = ""
) -> Trajectory:
  """Makes the trajectory of a conversation that the engine continued.

  Args:
    parts: of the conversation, whose records are `requests.Completion`.
    domain: which KL weight applies.

  Raises:
    ValueError: if a part does not hold exactly what its completions were given
      and drew, or they were drawn with penalties or biases.
  """
  return Trajectory(parts=tuple(map(_from_part, parts)), domain=domain)


def _from_part(part: token_stream.Part) -> Part:
  written = np.zeros(len(part.token_ids), bool)
  kept: list[np.ndarray | None] = [None] * len(part.token_ids)
  experts, selection = [], []
  recorded = 0
  for completion in part.records:
    _require_replayable(completion)
    given = len(completion.prompt_ids)
    end = given + len(completion.token_ids)
    both = (*completion.prompt_ids, *completion.token_ids)
    if part.token_ids[:end] != both or part.logprobs[given:end] != tuple(
      completion.logprobs
    ):
      raise ValueError(
        f"request {completion.request_id!r} is not what the part holds"
      )
    written[given:end] = True
    kept[given:end] = completion.kept
    # A later turn runs what an earlier one drew once more, as its prompt. What
    # a token was drawn behind is what the turn that drew it ran.
    for arrays, array in (
      (experts, completion.experts_LNA),
      (selection, completion.selection_LNS),
    ):
      if array is not None:
        arrays.append(array[:, recorded:])
    recorded = end - 1
  if written.tolist() != list(part.written):
    raise ValueError("a part has written tokens that no completion drew")
  return Part(
    token_ids_N=np.array(part.token_ids),
    written_N=written,
    logp_N=np.array(part.logprobs),
    kept=kept if any(ids is not None for ids in kept) else None,
    experts_LNA=np.concatenate(experts, axis=1) if experts else None,
    selection_LNS=np.concatenate(selection, axis=1) if selection else None,
  )
