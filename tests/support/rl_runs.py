"""A run of GRPO on a tiny model, for tests."""

from flax import nnx
import numpy as np

from dsv32_jax.data import tokenizer
from dsv32_jax.generation import programs
from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import run_config
from dsv32_jax.training import checkpoint
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers.tasks import mixture
from tests.support import models
from tests.support import stage_steps

VOCAB = 300


def config(**changes):
  learner = learner_config.LearnerConfig(
    grpo=grpo.GrpoConfig(
      clip_low=0.2, clip_high=0.2, kl_weight=0.05, off_policy_threshold=0.1
    ),
    domain_kl_weights=(("sorting", 0.0),),
    drop_equal_groups=True,
    minibatches=2,
    reference_every=3,
  )
  defaults = dict(
    model=models.tiny_config(
      vocab_size=VOCAB, num_layers=2, num_mtp_layers=0, initializer_scale=0.05
    ),
    tasks=(
      mixture.TaskConfig(kind="sorting", size=2, largest=9),
      mixture.TaskConfig(kind="arithmetic", size=2, largest=9),
    ),
    learner=learner,
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=1e-3)
    ),
    sampler=run_config.SamplerConfig(
      engine=programs.EngineConfig(
        max_batch=4, page_size=16, num_pages=60, prefill_chunk=16, max_length=96
      ),
      max_tokens=5,
      top_p=0.95,
    ),
    rollouts=5,
    prompts=3,
    group_size=4,
    row_lengths=(95,),
    scoring_workers=1,
    # On a loaded machine a score may wait: no answer is to fail for that.
    scoring_seconds=120.0,
    evaluation=run_config.EvaluationConfig(every=2, problems=4),
    tokenizer=tokenizer.TokenizerConfig(vocab_size=VOCAB),
    checkpoint=checkpoint.CheckpointConfig(every_steps=2),
  )
  return run_config.RlConfig(**(defaults | changes))


def assert_equal_runs(folder, whole, parts):
  """Asserts equal bytes of FOLDER/whole and FOLDER/parts, and of parameters.

  Args:
    folder: where both runs wrote their metrics.
    whole: policy of the run that was let be.
    parts: policy of the one that stopped and went on.
  """
  one, other = (
    (folder / name / "metrics.jsonl").read_bytes()
    for name in ("whole", "parts")
  )
  assert one == other
  want, got = (
    stage_steps.flat(nnx.state(policy.model())) for policy in (whole, parts)
  )
  for path, value in want.items():
    np.testing.assert_array_equal(got[path], value, err_msg=str(path))
