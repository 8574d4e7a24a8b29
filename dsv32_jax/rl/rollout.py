"""From finished answers and their rewards to the batches of a rollout."""

from collections.abc import Sequence

import numpy as np

from dsv32_jax.generation import requests
from dsv32_jax.model import config as config_lib
from dsv32_jax.rl import config as rl_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import replay

# N tokens of a trajectory, P prompts, G answers a prompt


def from_completion(
  completion: requests.Completion, *, domain: str = ""
) -> replay.Trajectory:
  """Makes the trajectory of an answer: prompt given, answer written.

  Raises:
    ValueError: if nothing was drawn.
  """
  given, drawn = len(completion.prompt_ids), len(completion.token_ids)
  if not drawn:
    raise ValueError(f"request {completion.request_id!r} drew no token")
  kept = None
  if any(ids is not None for ids in completion.kept):
    kept = [None] * given + list(completion.kept)
  return replay.Trajectory(
    token_ids_N=np.array([*completion.prompt_ids, *completion.token_ids]),
    written_N=np.arange(given + drawn) >= given,
    logp_N=np.array([0.0] * given + list(completion.logprobs)),
    kept=kept,
    experts_LNA=completion.experts_LNA,
    selection_LNS=completion.selection_LNS,
    domain=domain,
  )


def minibatches(
  groups: Sequence[Sequence[replay.Trajectory]],
  rewards: Sequence[Sequence[float]],
  config: rl_config.LearnerConfig,
  model: config_lib.ModelConfig,
  *,
  lengths: Sequence[int],
  seed: int,
  num_rows: int | None = None,
) -> list[replay.ReplayBatch]:
  """Turns a rollout into the batches of its optimiser steps.

  Advantages are those of whole groups; the answers are then shuffled, so that
  a minibatch need not hold a group. They are of one shape but for the length.

  Args:
    groups: G trajectories to each of P prompts.
    rewards: likewise.
    config: advantages, filter, KL weights, number of minibatches.
    model: shape of the model.
    lengths: allowed lengths of a row.
    seed: of the shuffle.
    num_rows: rows of a batch; default: what the whole rollout needs, so that
      filtered rollouts do not compile anew.

  Returns:
    At most `config.minibatches` batches, none if the filter left nothing.

  Raises:
    ValueError: if groups and rewards do not fit each other.
  """
  sizes = [len(group) for group in groups]
  if sizes != [len(group) for group in rewards] or len(set(sizes)) != 1:
    raise ValueError(
      f"groups of {sizes} and rewards of {[len(group) for group in rewards]}"
      " must be P times G"
    )
  rewards_PG = np.asarray(rewards, np.float32)
  if not np.all(np.isfinite(rewards_PG)):
    raise ValueError("a reward is not finite")
  advantages_PG = np.asarray(
    grpo.group_advantages(rewards_PG, divide_by_std=config.divide_by_std)
  )
  informative_P = np.asarray(grpo.informative_groups(rewards_PG))
  used = [
    (trajectory, advantage)
    for group, advantages_G, informative in zip(
      groups, advantages_PG, informative_P
    )
    if informative or not config.drop_equal_groups
    for trajectory, advantage in zip(group, advantages_G)
  ]
  order = np.random.default_rng(seed).permutation(len(used))
  if num_rows is None:
    num_rows = -(-rewards_PG.size // config.minibatches)
  batches = []
  for part in np.array_split(order, config.minibatches):
    if len(part):
      trajectories = [used[place][0] for place in part]
      batches.append(
        replay.pack(
          trajectories,
          [used[place][1] for place in part],
          [config.kl_weight(one.domain) for one in trajectories],
          model,
          num_rows=num_rows,
          lengths=lengths,
        )
      )
  return batches
