"""The comparisons of RL: what they hold apart, what they vary."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import rl_ablation
from configs import rl_length
from configs import rl_shown
from dsv32_jax import config_files
from dsv32_jax.model import fresh
from dsv32_jax.rl import ablation
from dsv32_jax.rl import length_study
from dsv32_jax.rl import once
from dsv32_jax.rl import policy
from dsv32_jax.rl import run_config
from dsv32_jax.rl import sampling
from dsv32_jax.rl import shown
from dsv32_jax.training import model_checkpoint
from dsv32_jax.verifiers import tasks
from tests.support import models

SHOWN = config_files.build(shown.ShownConfig, rl_shown.get_config())
ABLATION = config_files.build(run_config.RlConfig, rl_ablation.get_config())
LENGTH = config_files.build(length_study.LengthConfig, rl_length.get_config())


def contents(problems):
  return {(problem.task, problem.content) for problem in problems}


def test_nothing_held_out_is_learned_from():
  held_out = contents(sampling.held_out_problems(SHOWN.rl))
  solved = contents(shown.solved_problems(SHOWN.rl, SHOWN.solved))
  mixture = tasks.Mixture(SHOWN.rl.tasks, split="train", seed=SHOWN.rl.seed)
  posed = contents(
    mixture.problem(number)
    for number in range(SHOWN.rl.rollouts * SHOWN.rl.prompts)
  )
  assert len(held_out) == 400 and len(solved) == SHOWN.solved
  assert not held_out & solved and not held_out & posed


def test_the_reward_is_the_verifier_alone():
  problem = shown.solved_problems(SHOWN.rl, SHOWN.solved)[0]
  assert SHOWN.rl.reward.format_weight == SHOWN.rl.reward.language_weight == 0
  assert SHOWN.rl.reward.length is None
  assert problem.score(problem.messages()[-1]["content"]).value == 1


def test_an_arm_turns_off_what_it_says():
  def switches(arm):
    learner = ablation.ARMS[arm](ABLATION.learner)
    rest = dataclasses.replace(
      learner,
      grpo=ABLATION.learner.grpo,
      keep_routing=True,
      keep_sampling_mask=True,
    )
    assert rest == ABLATION.learner
    return (
      learner.grpo.unbiased_kl,
      learner.grpo.off_policy_threshold is not None,
      learner.keep_routing,
      learner.keep_sampling_mask,
    )

  on = np.ones(4, bool)
  want = [on, *(on & ~np.eye(4, dtype=bool)), ~on]
  assert [switches(arm) for arm in ablation.ARMS] == [
    tuple(row.tolist()) for row in want
  ]


def test_the_length_penalty_alone_tells_its_arms_apart():
  reward = LENGTH.rl.reward
  free, penal = (length_study.ARMS[arm](reward) for arm in length_study.ARMS)
  assert penal == reward and free.length is None
  assert dataclasses.replace(free, length=reward.length) == reward
  with pytest.raises(ValueError, match=r"rl\.reward\.length must be set"):
    dataclasses.replace(LENGTH, rl=dataclasses.replace(LENGTH.rl, reward=free))


def test_the_start_sees_long_and_short_thinking():
  problems = shown.solved_problems(LENGTH.rl, 4)
  rows = list(itertools.islice(length_study.solved_rows(LENGTH), 4))
  for number, (problem, row) in enumerate(zip(problems, rows, strict=True)):
    pieces = json.loads(row["pieces"])
    learnt = [piece for piece in pieces if piece.get("learnt")]
    thinking, end, answer, eos = learnt
    steps = problem.reasoning.splitlines()
    kept = steps if number % LENGTH.direct_every else steps[-1:]
    assert len(steps) == 3 and thinking["text"].splitlines() == kept
    assert (end["special"], eos["special"]) == ("think_end", "eos")
    assert problem.score(answer["text"]).value == 1


def test_an_ablation_needs_something_to_stabilise():
  ablation.check(ABLATION)
  same = dataclasses.replace(ABLATION.sampler, weights="same")
  with pytest.raises(ValueError, match=r"sampler\.weights"):
    ablation.check(dataclasses.replace(ABLATION, sampler=same))
  free = dataclasses.replace(ABLATION.learner, keep_routing=False)
  with pytest.raises(ValueError, match=r"learner\.keep_routing"):
    ablation.check(dataclasses.replace(ABLATION, learner=free))


def test_a_result_is_computed_once(tmp_path):
  calls = []

  def compute():
    calls.append(None)
    return {"value": [1, 2.5, None]}

  path = str(tmp_path / "result.json")
  assert once.once(path, compute) == once.once(path, compute)
  assert len(calls) == 1


def test_a_fine_tuning_that_was_killed_at_its_end_begins_anew(
  tmp_path, monkeypatch
):
  """Its best model was saved, and that it was done was not."""
  values = iter((0.25, 0.5, 0.125))

  class Tuning:
    """A stand-in whose evaluations are known, each of another model."""

    step, curve = 0, ()

    def __init__(self, config, workdir, name, *, init_from):
      del config, workdir, name, init_from

    def train(self, steps):
      self.step += steps

    def evaluate(self):
      return next(values)

    def model(self):
      return models.tiny_model(
        num_layers=2, num_dense_layers=1, num_mtp_layers=0, seed=self.step
      )

    def __enter__(self):
      return self

    def __exit__(self, *exception):
      pass

  monkeypatch.setattr(shown, "FineTuning", Tuning)
  config = dataclasses.replace(
    SHOWN, solved=4, evaluate_every=3, patience=1, max_steps=6
  )
  starts = []
  for _ in range(2):
    shown.fine_tune_until_flat(config, str(tmp_path))
    loaded = model_checkpoint.load_model(shown.start_folder(str(tmp_path)))
    starts.append(np.asarray(loaded.head.kernel[...]))
    config = dataclasses.replace(config, max_steps=3)
  # First the second of two, then the only one.
  for found, step in zip(starts, (6, 3), strict=True):
    tuning = Tuning(config, None, "sft", init_from=None)
    tuning.step = step
    np.testing.assert_array_equal(found, tuning.model().head.kernel[...])


def test_a_fine_tuning_starts_from_the_model_it_is_told(tmp_path):
  pretrained = fresh.fresh_model(SHOWN.rl.model, seed=7, dtype=jnp.float32)
  folder = str(tmp_path / "checkpoints")
  model_checkpoint.save_model(pretrained, folder)
  policy.make_tokenizer(SHOWN.rl).save(tmp_path / "tokenizer.json")
  shown.write_solved(SHOWN.rl, 4, str(tmp_path / shown.SOLVED_FILE))
  config = dataclasses.replace(
    SHOWN, rl=dataclasses.replace(SHOWN.rl, init_from=folder)
  )
  with shown.FineTuning(
    config, str(tmp_path), "sft", init_from=config.rl.init_from
  ) as tuning:
    found = tuning.model().head.kernel[...]
  np.testing.assert_array_equal(found, pretrained.head.kernel[...])


@pytest.mark.parametrize("name", ["solved", "patience", "max_steps"])
def test_a_fine_tuning_of_nothing_is_refused(name):
  with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
    dataclasses.replace(SHOWN, **{name: 0})


def test_a_rounded_hand_over_changes_matrices_only():
  model = models.tiny_model(num_layers=2, num_mtp_layers=0)
  rounded = sampling.handed_over(model, "float8_e4m3fn")
  kernel, other = model.head.kernel[...], rounded.head.kernel[...]
  gap = np.abs(np.asarray(kernel - other)) / np.abs(np.asarray(kernel))
  normal = np.abs(np.asarray(kernel)) > 2**-6
  # Three bits of mantissa: half a unit in the last place is 1/16.
  assert 0 < gap[normal].max() <= 1 / 16
  np.testing.assert_array_equal(
    model.final_norm.scale[...], rounded.final_norm.scale[...]
  )
