"""What the engine drew, the learner finds again: sampler and trainer agree."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from dsv32_jax.rl import config as rl_config
from dsv32_jax.rl import grpo
from dsv32_jax.rl import learner
from dsv32_jax.rl import rollout
from dsv32_jax.rl import trajectory as trajectory_lib
from tests.support import models

# B batch, T tokens

CONFIG = rl_config.LearnerConfig(
  grpo=grpo.GrpoConfig(
    clip_low=0.2, clip_high=0.2, kl_weight=0.0, off_policy_threshold=0.1
  ),
  temperature=0.8,
  replay_selection=True,
)


@pytest.fixture(scope="module")
def model():
  return models.tiny_model(num_layers=2, num_mtp_layers=0)


@pytest.fixture(scope="module")
def batch(model):
  """Groups of three answers to two prompts, truncated, all recorded."""
  engine = engine_lib.Engine(
    model,
    engine_lib.EngineConfig(
      max_batch=4, page_size=4, num_pages=60, prefill_chunk=8, max_length=48
    ),
  )
  sampling = requests.SamplingParameters(
    max_tokens=10, temperature=0.8, top_p=0.8, top_k=20
  )
  asked = [
    requests.Request(
      prompt_ids=np.asarray(models.random_tokens((length,), seed=length)),
      sampling=dataclasses.replace(sampling, seed=length + answer),
      want_routing=True,
      want_selection=True,
    )
    for length in (12, 5)
    for answer in range(3)
  ]
  answers = [trajectory_lib.from_completion(c) for c in engine.generate(asked)]
  (packed,) = rollout.minibatches(
    [answers[:3], answers[3:]],
    [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]],
    CONFIG,
    model.config,
    lengths=(24,),
    seed=0,
  )
  assert packed.batch.loss_mask_BT.sum() == 60
  return packed


def log_ratios(model, batch, config):
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    return learner.policy_forward(
      nnx.merge(graph, state), batch, config, routing=config.keep_routing
    )[1]

  gap_BT = np.abs(run(state, batch) - batch.old_logp_BT)
  return gap_BT[batch.batch.loss_mask_BT > 0]


def test_ratios_of_an_engines_rollout_are_one(model, batch):
  gaps = log_ratios(model, batch, CONFIG)
  assert gaps.max() < 1e-4 and gaps.mean() < 1e-5


@pytest.mark.parametrize(
  "change", [dict(keep_sampling_mask=False), dict(temperature=1.0)]
)
def test_without_the_samplers_distribution_they_are_not(model, batch, change):
  config = dataclasses.replace(CONFIG, **change)
  assert log_ratios(model, batch, config).max() > 1e-2


def test_keep_routing_holds_when_the_router_bias_has_moved(model, batch):
  moved = nnx.clone(model)
  bias = moved.moe_layers.ffn.expert_bias
  noise = np.random.default_rng(0).normal(size=bias[...].shape)
  bias[...] += jnp.asarray(noise, jnp.float32)
  assert log_ratios(moved, batch, CONFIG).max() < 1e-4
  freely = dataclasses.replace(CONFIG, keep_routing=False)
  assert log_ratios(moved, batch, freely).max() > 1e-2
