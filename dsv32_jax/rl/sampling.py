"""The sampling half of a run: prompts out, scored groups back.

What a rollout holds follows from the weights, the seed and its number alone:
problems and draws have seeds of their own, and the engine gives a request the
same tokens whoever shares the batch with it.
"""

import abc
from collections.abc import Sequence
import dataclasses
import itertools
import time
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.data import tokenizer as tokenizer_lib
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests
from dsv32_jax.model import transformer
from dsv32_jax.rl import run_config
from dsv32_jax.rl import trajectory
from dsv32_jax.verifiers import reward as reward_lib
from dsv32_jax.verifiers import tasks

# Seeds of what is drawn for training, and for evaluation.
TRAIN, HELD_OUT = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """Groups of answers, scored.

  Attributes:
    number: from 0; its prompts have the numbers from number * prompts on.
    version: of the policy that drew it: rollouts it had learned from.
    groups: trajectories of each prompt.
    rewards: likewise.
    truncated: share of answers that were cut off.
    shared: share of prompt tokens that were computed for an earlier answer.
    seconds: by phase.
    held_out: pass@1 of that policy by domain, where it was measured.
    further: what else it was like.
  """

  number: int
  version: int
  groups: Sequence[Sequence[trajectory.Trajectory]]
  rewards: Sequence[Sequence[reward_lib.Reward]]
  truncated: float
  shared: float
  seconds: dict[str, float]
  held_out: dict[str, float] | None = None
  further: dict[str, float] = dataclasses.field(default_factory=dict)


def prompt_ids(
  question: str, tokenizer: tokenizer_lib.Tokenizer, *, thinking: bool
) -> list[int]:
  """A user's question up to where the answer begins, as the chat format."""
  return tokenizer.encode_parts(
    [
      tokenizer.bos_id,
      tokenizer.special_id("user"),
      question,
      tokenizer.special_id("assistant"),
      tokenizer.special_id("think_start" if thinking else "think_end"),
    ]
  )


def handed_over(
  model: transformer.Transformer, weights: str = "same"
) -> transformer.Transformer:
  """Copies a model in memory: a learner's step gives its arrays up.

  Args:
    model: of the learner.
    weights: as of SamplerConfig; parameters are rounded to that type.
  """
  graph, state = nnx.split(model)

  def copy(x):
    if weights == "same" or x.ndim < 2:
      return jnp.copy(x)
    return x.astype(jnp.dtype(weights)).astype(x.dtype)

  return nnx.merge(graph, jax.tree.map(copy, state))


class Asked(NamedTuple):
  """A problem as it is put: its domain, and whether the answer thinks first."""

  problem: tasks.Problem
  domain: str
  thinking: bool


class Drawing(abc.ABC):
  """What samplers share: an engine, the policy's version, evaluation."""

  def __init__(self, config, model, tokenizer, engine=None):
    """Builds the engine, unless there is one to share."""
    self.config, self.tokenizer = config, tokenizer
    self.engine = engine or engine_lib.Engine(
      model, config.sampler.engine, eos_id=tokenizer.eos_id
    )
    self.version = -1

  def load(self, model: transformer.Transformer, version: int) -> None:
    """Takes the policy of a version; `model` may change afterwards."""
    self.engine.load(handed_over(model, self.config.sampler.weights))
    self.version = version

  def rollout(self, number: int) -> Rollout:
    """Draws and scores the groups of a number; first evaluates, where due."""
    evaluation, held_out = self.config.evaluation, None
    begin = time.perf_counter()
    if evaluation is not None and number % evaluation.every == 0:
      held_out = self.pass_at_1()
    seconds = {"evaluation": time.perf_counter() - begin}
    drawn = self.draw(number)
    return dataclasses.replace(
      drawn, held_out=held_out, seconds=seconds | drawn.seconds
    )

  def pass_at_1(self) -> dict[str, float]:
    """Share of held-out problems solved, whole and by domain, one try each.

    Every task and environment gives as many different problems. The verifier
    alone counts, not what else is rewarded.
    """
    pairs, found = self.held_out()
    found = {"pass_at_1": float(np.mean([x for _, x in pairs])), **found}
    for domain in sorted({domain for domain, _ in pairs}):
      mine = [x for name, x in pairs if name == domain]
      found[f"pass_at_1_{domain}"] = float(np.mean(mine))
    return found

  @abc.abstractmethod
  def draw(self, number: int) -> Rollout:
    """Draws and scores the groups of a number."""

  @abc.abstractmethod
  def held_out(self) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """Domain and outcome of each held-out problem, and what else was found."""


class Sampler(Drawing):
  """Draws rollouts of single answers with its own copy of the policy."""

  def __init__(
    self,
    config: run_config.RlConfig,
    model: transformer.Transformer,
    tokenizer: tokenizer_lib.Tokenizer,
    rewarder: reward_lib.Rewarder,
    engine: engine_lib.Engine | None = None,
  ):
    """Builds the engine; `load` gives it the policy.

    Args:
      config: of the run.
      model: of the policy's shape.
      tokenizer: of the policy.
      rewarder: scores answers.
      engine: to share; None: one of its own.
    """
    super().__init__(config, model, tokenizer, engine)
    self._rewarder = rewarder
    self._problems = tasks.Mixture(
      config.tasks, split="train", seed=config.seed
    )

  def draw(self, number: int) -> Rollout:
    """Draws and scores the groups of a number."""
    config = self.config
    groups = config.num_answer_groups
    first = number * groups
    problems = [
      _asked(config, *self._problems.drawn(first + place))
      for place in range(groups)
    ]
    seeds = [
      seed_of(config.seed, TRAIN, first + place, answer)
      for place in range(groups)
      for answer in range(config.group_size)
    ]
    repeated = [one for one in problems for _ in range(config.group_size)]
    before = self.engine.stats()
    start = time.perf_counter()
    completions = self._answers(repeated, seeds)
    drawn = time.perf_counter()
    rewards = self._score(repeated, completions)
    scored = time.perf_counter()
    trajectories = [
      trajectory.from_completion(completion, domain=asked.domain)
      for asked, completion in zip(repeated, completions)
    ]
    cut = [one.finish_reason == "length" for one in completions]
    return Rollout(
      number=number,
      version=self.version,
      groups=grouped(trajectories, config.group_size),
      rewards=grouped(rewards, config.group_size),
      truncated=float(np.mean(cut)),
      shared=shared(before, self.engine.stats()),
      seconds={"sampling": drawn - start, "scoring": scored - drawn},
    )

  def held_out(self) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """As of Drawing; further the mean tokens of an answer."""
    config = self.config
    problems = _held_out(config)
    seeds = [
      seed_of(config.evaluation.seed, HELD_OUT, place, 0)
      for place in range(len(problems))
    ]
    completions = self._answers(problems, seeds, record=False)
    rewards = self._score(problems, completions)
    tokens = float(np.mean([len(one.token_ids) for one in completions]))
    pairs = [(p.domain, r.outcome) for p, r in zip(problems, rewards)]
    return pairs, {"answer_tokens": tokens}

  def _answers(self, problems, seeds, *, record=True):
    """One completion a problem."""
    learner = self.config.learner
    asked = [
      requests.Request(
        prompt_ids=prompt_ids(
          one.problem.question, self.tokenizer, thinking=one.thinking
        ),
        sampling=self.config.sampler.parameters(
          temperature=learner.temperature, seed=seed
        ),
        want_routing=record and learner.replays_routing,
        want_selection=record and learner.replay_selection,
      )
      for one, seed in zip(problems, seeds)
    ]
    completions = self.engine.generate(asked)
    if learner.keep_sampling_mask:
      return completions
    return [
      dataclasses.replace(one, kept=(None,) * len(one.token_ids))
      for one in completions
    ]

  def _score(self, problems, completions):
    return self._rewarder.score(
      [
        reward_lib.Answer(
          problem=one.problem,
          response=self._text(completion.token_ids),
          num_tokens=len(completion.token_ids),
          thinking=one.thinking,
        )
        for one, completion in zip(problems, completions)
      ]
    )

  def _text(self, token_ids):
    """Text without eos and without ids that pad the model's vocabulary."""
    limit, eos = self.tokenizer.vocab_size, self.tokenizer.eos_id
    return self.tokenizer.decode(
      [token for token in token_ids if token < limit and token != eos]
    )


def held_out_problems(config: run_config.RlConfig) -> list[tasks.Problem]:
  """The problems of an evaluation: of each task its share, all different."""
  return [one.problem for one in _held_out(config)]


def _held_out(config) -> list[Asked]:
  seed, share = config.evaluation.seed, config.held_out_share
  return [
    _asked(config, task, problem)
    for task in config.tasks
    for problem in itertools.islice(
      tasks.generate(task.make(), split="held_out", seed=seed), share
    )
  ]


def _asked(config, task, problem) -> Asked:
  thinking = config.reward.thinking if task.thinking is None else task.thinking
  return Asked(problem, task.domain, thinking)


def shared(before, after) -> float:
  """Share of the prompt tokens between two counts that were not computed.

  Raises:
    ValueError: there was none: no prompt was short enough to be answered.
  """
  computed, shared = (
    after[name] - before[name] for name in ("prompt_tokens", "shared_tokens")
  )
  if not computed + shared:
    raise ValueError(
      "no prompt of a rollout fits: episodes.limits.window, or"
      " sampler.engine.max_length of single answers, is too small"
    )
  return shared / (computed + shared)


def grouped(items, size: int):
  """Lists of so many items each, in their order."""
  return [items[place : place + size] for place in range(0, len(items), size)]


def seed_of(*numbers: int) -> int:
  """A seed of 63 bits that follows from the numbers."""
  (word,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
  return int(word >> np.uint64(1))
