"""One GRPO step: forward under replay, losses, gradients, update.

The learner's model is the one that samples; what the sampler did is replayed
from the batch. Beside the policy's objective a step may train the indexer on
its KL (on detached inputs, as in sparse pretraining), the multi-token
prediction and the routers' biases: all are weights of the stage.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv32_jax.model import transformer
from dsv32_jax.rl import config as config_lib
from dsv32_jax.rl import grpo
from dsv32_jax.rl import logprobs
from dsv32_jax.rl import microbatches as microbatches_lib
from dsv32_jax.rl import replay as replay_lib
from dsv32_jax.training import step as step_lib

# B batch, T tokens, E experts, L layers, P prompts, G answers a prompt


class Reference(NamedTuple):
  """The parameters that a step changes, as the reference has them."""

  trained: Any
  router_bias: Any


def snapshot(state: step_lib.TrainState) -> Reference:
  """Copies the policy as a reference; steps give their state's arrays up."""
  return Reference(*jax.tree.map(jnp.copy, (state.trained, state.router_bias)))


def refresh_reference(config, state, reference) -> Reference:
  """Returns the policy every `reference_every` steps, else the reference."""
  every = config.reference_every
  if every is not None and int(state.step) and int(state.step) % every == 0:
    return snapshot(state)
  return reference


def policy_forward(
  model, batch, config: config_lib.LearnerConfig, *, routing, remat=None
):
  """Runs a model on a replay batch.

  Args:
    model: policy or reference.
    batch: ReplayBatch.
    config: what is replayed.
    routing: replay the sampler's experts.
    remat: rematerialisation of a layer, or None.

  Returns:
    The ModelOutput without logits, logp_BT and entropy_BT.
  """
  output = model(
    batch.batch.tokens_BT,
    positions_BT=batch.batch.positions_BT,
    segments_BT=batch.batch.segments_BT,
    options=config.stage.options(model.config),
    replay=batch.replayed(routing=routing, selection=config.replay_selection),
    order=batch.order,
    with_logits=False,
    remat=remat,
  )
  kept = batch.kept if config.keep_sampling_mask else logprobs.KeptSets()
  logp_BT, entropy_BT = logprobs.token_logprobs(
    output.hidden,
    model.head.kernel[...],
    batch.batch.targets_BT,
    temperature=config.temperature,
    kept=kept,
  )
  return output, logp_BT, entropy_BT


# Runs of one shape in one process share what is compiled.
@functools.lru_cache(maxsize=8)
def make_reference_scorer(graph, config: config_lib.LearnerConfig):
  """Builds the function that fills in `ref_logp_BT`.

  Returns:
    A function from (TrainState, Reference, ReplayBatch) to a ReplayBatch.
  """

  @jax.jit
  def score(state, reference, batch):
    model = step_lib.merge_model(graph, state._replace(**reference._asdict()))
    _, logp_BT, _ = policy_forward(
      model, batch, config, routing=config.reference_replays_routing
    )
    return logp_BT

  def fill(state, reference, batch) -> replay_lib.ReplayBatch:
    logp_BT = score(state, reference, batch)
    return dataclasses.replace(batch, ref_logp_BT=logp_BT)

  return fill


def rl_loss(
  model: transformer.Transformer, batch, config, *, per=None, remat=None
):
  """The stage's weighted losses on a replay batch.

  Args:
    model: the policy.
    batch: ReplayBatch, or a piece of one.
    config: config_lib.LearnerConfig.
    per: step.Denominators of the whole batch; default: of `batch`.
    remat: rematerialisation of a layer, or None.

  Returns:
    The scalar loss, and (metrics, load_LE) as of `step.stage_loss`.
  """
  stage, tokens = config.stage, batch.batch
  per = per or step_lib.denominators(tokens, 1, batch.order)
  output, logp_BT, entropy_BT = policy_forward(
    model, batch, config, routing=config.keep_routing, remat=remat
  )
  mask_BT = tokens.loss_mask_BT
  policy_loss, metrics = grpo.grpo_loss(
    logp_BT,
    batch.old_logp_BT,
    batch.ref_logp_BT,
    batch.advantages_B,
    mask_BT,
    config.grpo,
    kl_weight_B=batch.kl_weight_B,
    num_sequences=batch.num_sequences,
    trajectory_B=batch.trajectory_B,
  )
  metrics["entropy"] = jnp.sum(entropy_BT * mask_BT) / per.targets
  metrics["policy_loss"] = policy_loss
  loss = stage.lm_weight * policy_loss
  further, found, load_LE = step_lib.further_losses(
    model,
    output,
    tokens,
    stage,
    per,
    positions_BT=tokens.positions_BT,
    segments_BT=tokens.segments_BT,
    options=stage.options(model.config),
    order=batch.order,
    remat=remat,
  )
  loss += further
  return loss, (metrics | found | {"loss": loss}, load_LE)


@functools.lru_cache(maxsize=8)
def make_learner_step(
  graph,
  config: config_lib.LearnerConfig,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  rows: int | None = None,
  remat=None,
):
  """Builds the jitted step.

  Args:
    graph: structure of the model, from step.init_state.
    config: objective, replay and stage.
    optimizer: as given to step.init_state.
    microbatches: pieces the batch is cut into, one after the other.
    rows: of the batches meant; one with several times as many is cut into
      several times as many pieces. None: any number of rows.
    remat: rematerialisation of a layer, or None.

  Returns:
    A function from (TrainState, ReplayBatch) to (TrainState, metrics); the
    state is donated. A step whose gradient is not finite changes nothing but
    counters.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: step_lib.TrainState, batch: replay_lib.ReplayBatch):
    pieces = microbatches
    if rows is not None:
      pieces *= batch.advantages_B.shape[0] // rows
    per = step_lib.denominators(batch.batch, pieces, batch.order)

    def loss_of(trained, batch):
      model = step_lib.merge_model(graph, state._replace(trained=trained))
      return rl_loss(model, batch, config, per=per, remat=remat)

    gradients, (metrics, load_LE) = step_lib.accumulate(
      jax.grad(loss_of, has_aux=True),
      state.trained,
      batch,
      microbatches_lib.cut,
      pieces,
    )
    state, found = step_lib.update(
      state, gradients, load_LE, config.stage, optimizer
    )
    return state, metrics | found

  return step


def learn(step, score_reference, config, state, reference, batches):
  """Takes one step on each batch of a rollout.

  The reference is scored before the first step, on batches with a KL weight;
  elsewhere the sampler stands in for it, and the metric `kl` is to the sampler.

  Args:
    step: of make_learner_step; gives `state` up.
    score_reference: of make_reference_scorer.
    config: of both.
    state: TrainState.
    reference: Reference.
    batches: ReplayBatch each.

  Returns:
    TrainState, Reference and a list of metrics, one a step.
  """
  scored = [
    score_reference(state, reference, batch)
    if np.any(np.asarray(batch.kl_weight_B) > 0)
    else dataclasses.replace(batch, ref_logp_BT=batch.old_logp_BT)
    for batch in batches
  ]
  found = []
  for batch in scored:
    state, metrics = step(state, batch)
    found.append(metrics)
    reference = refresh_reference(config, state, reference)
  return state, reference, found
