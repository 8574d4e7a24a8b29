"""The four stabilisers, all on, each one off, and all off.

Paper section 3.1. The runs learn from stale rollouts of a sampler that does not
compute what the learner computes: without either there is nothing to stabilise.
"""

import dataclasses
import itertools
import os
from typing import Any

from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import loop
from dsv32_jax.rl import once
from dsv32_jax.rl import run_config
from dsv32_jax.training import metrics as metrics_lib


def _plain_kl(learner):
  grpo = dataclasses.replace(learner.grpo, unbiased_kl=False)
  return dataclasses.replace(learner, grpo=grpo)


def _no_sequence_masking(learner):
  grpo = dataclasses.replace(learner.grpo, off_policy_threshold=None)
  return dataclasses.replace(learner, grpo=grpo)


def _free_routing(learner):
  return dataclasses.replace(learner, keep_routing=False)


def _no_sampling_mask(learner):
  return dataclasses.replace(learner, keep_sampling_mask=False)


def _all_off(learner):
  for turn_off in (
    _plain_kl,
    _no_sequence_masking,
    _free_routing,
    _no_sampling_mask,
  ):
    learner = turn_off(learner)
  return learner


# Arm -> what it makes of the learner that has all four on.
ARMS = {
  "all on": lambda learner: learner,
  "plain KL": _plain_kl,
  "no sequence masking": _no_sequence_masking,
  "free routing": _free_routing,
  "no sampling mask": _no_sampling_mask,
  "all off": _all_off,
}
# Columns that are plotted, and their units; those that leap are plotted on a
# logarithmic axis.
CURVES = {
  "outcome": "share of answers solved",
  "kl": "KL estimate, nats a token",
  "entropy": "entropy, nats a token",
  "ratio_deviation": "mean squared deviation of the ratio from 1",
  "clipped": "share of tokens whose clipped ratio counts",
  "dropped_sequences": "share of sequences whose surrogate is dropped",
  "gradient_norm": "norm of the gradient before it is clipped",
}
LEAPING = ("kl", "ratio_deviation", "gradient_norm")


def check(config: run_config.RlConfig) -> None:
  """Raises unless all four are on and have something to do.

  Raises:
    ValueError: naming the field.
  """
  learner, sampler = config.learner, config.sampler
  wrong = {
    "learner.grpo.unbiased_kl": not learner.grpo.unbiased_kl,
    "learner.grpo.off_policy_threshold": (
      learner.grpo.off_policy_threshold is None
    ),
    "learner.keep_routing": not learner.keep_routing,
    "learner.keep_sampling_mask": not learner.keep_sampling_mask,
    "learner.grpo.kl_weight": not learner.uses_reference,
    "sampler.weights": sampler.weights == "same",
    "sampler.top_p": sampler.top_p == 1 and not sampler.top_k,
    "evaluation": config.evaluation is None,
  }
  for name, is_wrong in wrong.items():
    if is_wrong:
      raise ValueError(f"{name}: an ablation starts with it on")


def run(
  config: run_config.RlConfig, arm: str, seed: int, workdir: str
) -> dict[str, Any]:
  """Runs one arm with one seed, unless it is done.

  Args:
    config: with all four on.
    arm: of ARMS.
    seed: added to the config's.
    workdir: folder of the sweep.

  Returns:
    `curves`: of each column of CURVES the values of the rollouts, None where a
    rollout had none; `pass_at_1` of the last policy; `seconds` of all rollouts.
  """
  folder = os.path.join(workdir, arm.replace(" ", "_"), f"seed_{seed}")
  learner: learner_config.LearnerConfig = ARMS[arm](config.learner)
  changed = dataclasses.replace(
    config, learner=learner, seed=config.seed + seed
  )

  def result():
    loop.train(changed, folder, title=f"{arm}, seed {seed}")
    rows = metrics_lib.read_rows(os.path.join(folder, "metrics.jsonl"))
    times = metrics_lib.read_rows(os.path.join(folder, "timings.jsonl"))
    trained = [row for row in rows if row["name"] == "train"]
    return {
      "curves": {name: [row.get(name) for row in trained] for name in CURVES},
      "pass_at_1": rows[-1]["pass_at_1"],
      "seconds": sum(row["seconds"] for row in times),
    }

  os.makedirs(folder, exist_ok=True)
  return once.once(os.path.join(folder, "result.json"), result)


def sweep(config: run_config.RlConfig, seeds: int, workdir: str):
  """Yields (arm, result) of every run; seed by seed, all arms of each."""
  check(config)
  for seed, arm in itertools.product(range(seeds), ARMS):
    yield arm, run(config, arm, seed, workdir)
