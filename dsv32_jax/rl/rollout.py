"""From finished answers and their rewards to the batches of a rollout."""

from collections.abc import Sequence

import numpy as np

from dsv32_jax.model import config as config_lib
from dsv32_jax.rl import config as rl_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import replay
from dsv32_jax.rl import trajectory as trajectory_lib

# P prompts, G answers a prompt


def minibatches(
  groups: Sequence[Sequence[trajectory_lib.Trajectory]],
  rewards: Sequence[Sequence[float]],
  config: rl_config.LearnerConfig,
  model: config_lib.ModelConfig,
  *,
  lengths: Sequence[int],
  seed: int,
  num_rows: int | None = None,
  pieces: int = 1,
) -> list[replay.ReplayBatch]:
  """Turns a rollout into the batches of its optimiser steps.

  Advantages are those of whole groups; the answers are then shuffled, so that
  a minibatch need not hold a group. They are of one shape but for the length,
  and where trajectories have so many parts that rows do not suffice, they have
  2, 4 or 8 times as many rows and pieces. A trajectory without parts is left
  out.

  Args:
    groups: G trajectories to each of P prompts.
    rewards: likewise.
    config: advantages, filter, KL weights, number of minibatches.
    model: shape of the model.
    lengths: allowed lengths of a row.
    seed: of the shuffle.
    num_rows: rows of a batch; default: what the whole rollout needs, so that
      filtered rollouts do not compile anew.
    pieces: microbatches that these rows are cut into.

  Returns:
    At most `config.minibatches` batches, none if the filter left nothing.

  Raises:
    ValueError: if groups and rewards do not fit each other, or a trajectory
      has more parts than a piece has rows.
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
    if trajectory.parts
  ]
  order = np.random.default_rng(seed).permutation(len(used))
  if num_rows is None:
    num_rows = -(-rewards_PG.size // config.minibatches)
  batches = []
  for some in np.array_split(order, config.minibatches):
    if len(some):
      trajectories = [used[place][0] for place in some]
      times = _times(trajectories, num_rows, pieces)
      batches.append(
        replay.pack(
          trajectories,
          [used[place][1] for place in some],
          [config.kl_weight(one.domain) for one in trajectories],
          model,
          num_rows=times * num_rows,
          lengths=lengths,
          pieces=times * pieces,
        )
      )
  return batches


def _times(trajectories, num_rows: int, pieces: int) -> int:
  """How many times the rows are needed, as a power of two."""
  counts = [len(one.parts) for one in trajectories]
  if max(counts) > num_rows // pieces:
    raise ValueError(
      f"a trajectory has {max(counts)} parts, more than the"
      f" {num_rows // pieces} rows of a microbatch"
    )
  times = 1
  while replay.rows_of_parts(counts, times * num_rows, times * pieces) is None:
    times *= 2
  return times
