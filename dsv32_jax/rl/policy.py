"""The learning half of a run: state, reference and checkpoints."""

import itertools
import logging
import os

import jax
import numpy as np

from dsv32_jax import sharding
from dsv32_jax.agents import chat_format
from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.model import fresh
from dsv32_jax.model import transformer
from dsv32_jax.rl import demonstrations
from dsv32_jax.rl import grpo
from dsv32_jax.rl import learner
from dsv32_jax.rl import replay
from dsv32_jax.rl import rollout as rollout_lib
from dsv32_jax.rl import run_config
from dsv32_jax.rl import sampling
from dsv32_jax.training import checkpoint as checkpoint_lib
from dsv32_jax.training import model_checkpoint
from dsv32_jax.training import optimizer as optimizer_lib
from dsv32_jax.training import placement
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import run_folder
from dsv32_jax.training import step as step_lib
from dsv32_jax.verifiers import tasks

# Problems of each task that a tokenizer is trained on.
_TOKENIZER_PROBLEMS = 500
_log = logging.getLogger(__name__)


class Policy:
  """What learns; `resume` first, `close` last.

  Attributes:
    config: of the run.
    mesh: of the devices.
    tokenizer: of the policy.
    version: rollouts learned from.
    state: TrainState, None before `resume`.
  """

  def __init__(self, config: run_config.RlConfig, workdir):
    """Opens the checkpoint folder and gets the tokenizer.

    Raises:
      ValueError: if the tokenizer has more ids than the model, the mesh does
        not fit the devices, or there are several processes.
    """
    if jax.process_count() > 1:
      raise ValueError(
        f"{jax.process_count()} processes: the generation engine runs in one"
      )
    self.config = config
    self.mesh = sharding.make_mesh(config.mesh)
    self.tokenizer = run_folder.kept_tokenizer(
      workdir,
      lambda: make_tokenizer(config),
      vocab_size=config.model.vocab_size,
    )
    self.version = 0
    self.state = None
    self._checkpointer = checkpoint_lib.Checkpointer(
      os.path.join(workdir, "checkpoints"), config.checkpoint
    )
    self._optimizer = optimizer_lib.make_optimizer(config.optimizer)
    self._reference = self._graph = None

  def resume(self) -> int:
    """Makes the state: the newest checkpoint's, or that of a beginning.

    Returns:
      The version: rollouts learned from.
    """
    config, stage = self.config, self.config.learner.stage
    if self._checkpointer.latest_step() is None:
      self._graph, self.state = placement.first_state(
        run_lib.first_model(config, self.mesh),
        stage,
        self._optimizer,
        self.mesh,
      )
      if config.learner.uses_reference:
        self._reference = learner.snapshot(self.state)
    else:
      self._restore()
    self._step = learner.make_learner_step(
      self._graph,
      config.learner,
      self._optimizer,
      microbatches=config.microbatches,
      rows=config.rows,
      remat=run_lib.REMAT[config.remat],
    )
    self._score = learner.make_reference_scorer(self._graph, config.learner)
    return self.version

  def model(self) -> transformer.Transformer:
    """The policy as it is; its arrays are given up by the next `learn`."""
    return step_lib.merge_model(self._graph, self.state)

  def learn(self, rollout: sampling.Rollout) -> dict[str, float]:
    """Takes the optimiser steps of a rollout.

    Returns:
      Means over the steps, and what the rollout was like.

    Raises:
      ValueError: after too many steps in a row with gradients not finite.
    """
    config = self.config
    values = [[r.value for r in group] for group in rollout.rewards]
    batches = rollout_lib.minibatches(
      rollout.groups,
      values,
      config.learner,
      config.model,
      lengths=config.row_lengths,
      seed=_seed(config.seed, rollout.number),
      num_rows=config.rows,
      pieces=config.microbatches,
    )
    found = _describe(rollout, values)
    found["steps"] = len(batches)
    if batches:
      parts = [replay.bytes_per_token(batch) for batch in batches]
      for name in parts[0]:
        found[f"bytes_a_token_{name}"] = float(
          np.mean([part[name] for part in parts])
        )
    self.state, self._reference, metrics = learner.learn(
      self._step,
      self._score,
      config.learner,
      self.state,
      self._reference,
      [replay.place(batch, self.mesh) for batch in batches],
    )
    self.version += 1
    metrics = jax.device_get(metrics)
    for name in sorted(metrics[0]) if metrics else ():
      found[name] = float(np.mean([row[name] for row in metrics]))
    self._check(rollout.number)
    return found

  def save(self) -> None:
    """Starts saving as the checkpoint of the version."""
    trees = run_lib.saved_trees(self._graph, self.state)
    if self.config.learner.uses_reference:
      trees["reference"] = self._reference._asdict()
    notes = model_checkpoint.model_notes(self.model())
    self._checkpointer.save(self.version, trees, notes)

  def close(self) -> None:
    """Waits for a save under way."""
    self._checkpointer.close()

  def _restore(self) -> None:
    config, stage = self.config, self.config.learner.stage
    model = fresh.abstract_model(
      config.model,
      dtype=config.parameter_dtype,
      compute_dtype=config.compute_dtype,
    )
    self._graph, state = placement.abstract_state(
      model, stage, self._optimizer, self.mesh
    )
    targets = run_lib.saved_trees(self._graph, state)
    if config.learner.uses_reference:
      targets["reference"] = learner.Reference(
        state.trained, state.router_bias
      )._asdict()
    found = self._checkpointer.restore(targets)
    self.state = run_lib.restored_state(self._graph, state, found.trees, stage)
    if config.learner.uses_reference:
      self._reference = learner.Reference(**found.trees["reference"])
    self.version = found.step

  def _check(self, number: int) -> None:
    if optimizer_lib.must_stop(self.config.optimizer, self.state.optimizer):
      raise ValueError(
        f"rollout {number}: the gradients of"
        f" {int(self.state.optimizer.consecutive_skips)} steps in a row were"
        " not finite"
      )


def _seed(*numbers: int) -> int:
  """A seed that follows from the numbers, the same in every process."""
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _describe(rollout: sampling.Rollout, values) -> dict[str, float]:
  """What a rollout was like, whatever is learned from it."""
  rewards = list(itertools.chain(*rollout.rewards))
  errors = [one.error for one in rewards if one.error]
  if errors:
    _log.warning(
      "rollout %d: %d answers have no score of their own, the first: %s",
      rollout.number,
      len(errors),
      errors[0],
    )
  answers = list(itertools.chain(*rollout.groups))
  informative_P = np.asarray(grpo.informative_groups(np.asarray(values)))
  found = {
    "reward": float(np.mean([r.value for r in rewards])),
    "outcome": float(np.mean([r.outcome for r in rewards])),
    "failed_scores": len(errors),
    "informative_groups": float(np.mean(informative_P)),
    "answer_tokens": _written(answers),
    "truncated": rollout.truncated,
    "staleness": rollout.number - rollout.version,
    **rollout.further,
  }
  for domain in sorted({one.domain for one in answers}):
    mine = [r.value for r, a in zip(rewards, answers) if a.domain == domain]
    found[f"reward_{domain}"] = float(np.mean(mine))
  return found


def _written(answers) -> float:
  """Tokens that the policy wrote, a trajectory."""
  return float(
    np.mean([sum(p.written_N.sum() for p in one.parts) for one in answers])
  )


def make_tokenizer(config: run_config.RlConfig) -> tokenizer_lib.Tokenizer:
  """Loads the configured tokenizer, or trains one on problems and solutions.

  Raises:
    ValueError: if the file is no tokenizer.
  """
  if config.tokenizer.path is not None:
    return tokenizer_lib.load(config.tokenizer.path)
  texts = []
  if config.episodes is not None:
    texts += demonstrations.texts(
      config.episodes, seed=config.seed, count=_TOKENIZER_PROBLEMS
    )
  for task in config.tasks:
    problems = tasks.generate(task.make(), split="train", seed=config.seed)
    for problem in itertools.islice(problems, _TOKENIZER_PROBLEMS):
      answer = problem.messages()[-1]
      texts += [
        problem.question,
        answer["reasoning_content"],
        answer["content"],
      ]
  phrases = chat_format.PHRASES if config.tokenizer.whole_format else ()
  return tokenizer_lib.train(texts, config.tokenizer.vocab_size, phrases)
