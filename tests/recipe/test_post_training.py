"""Stages of post-training, what they are made of, and what they forget."""

import dataclasses
import itertools
import json
import pathlib

import pytest

from configs import post_training as configs
from dsv32_jax.data import pieces
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.recipe import post_training
from dsv32_jax.recipe import post_training_config
from dsv32_jax.recipe import post_training_report
from dsv32_jax.recipe import solved
from dsv32_jax.rl import config as learner_config
from dsv32_jax.rl import demonstrations
from dsv32_jax.rl import environments
from dsv32_jax.rl import policy as policy_lib
from dsv32_jax.training import optimizer
from dsv32_jax.training import schedule
from dsv32_jax.verifiers import length
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks

SMOKE = configs.smoke()


def domain(which, **changes):
  (found,) = (one for one in SMOKE.domains if one.name == which)
  return dataclasses.replace(found, **changes)


def with_domains(*domains, **changes):
  return dataclasses.replace(SMOKE, domains=domains, **changes)


def test_a_specialist_is_of_one_domain_in_one_mode():
  names = [one.name for one in SMOKE.specialists]
  assert names == ["sorting_thinking", "sorting_chat", "calculator_chat"]
  for one in SMOKE.specialists:
    rl = SMOKE.specialist_rl(one)
    asked = [*rl.tasks, *(rl.episodes.environments if rl.episodes else ())]
    assert [x.name for x in asked] == [one.name]
    assert asked[0].thinking is one.name.endswith("thinking")
    assert rl.rollouts == SMOKE.rl.rollouts and rl.episode_prompts is None


def test_the_mixture_is_one_run_over_all_by_weight():
  rl = SMOKE.stage_rl(SMOKE.specialists, 7)
  assert [x.name for x in rl.tasks] == ["sorting_thinking", "sorting_chat"]
  assert [x.name for x in rl.episodes.environments] == ["calculator_chat"]
  assert rl.rollouts == 7
  # One weight of three, of four prompts.
  assert (rl.num_answer_groups, rl.num_episode_groups) == (3, 1)
  heavy = domain("calculator")
  heavy = dataclasses.replace(
    heavy, environment=dataclasses.replace(heavy.environment, weight=50.0)
  )
  rl = with_domains(domain("sorting"), heavy).stage_rl(
    with_domains(domain("sorting"), heavy).specialists, 7
  )
  assert (rl.num_answer_groups, rl.num_episode_groups) == (1, 3)


def test_a_domain_may_have_its_own_grpo():
  own = dict(
    rollouts=9,
    optimizer=optimizer.OptimizerConfig(
      schedule=schedule.ScheduleConfig(peak=1e-5)
    ),
    learner=dataclasses.replace(SMOKE.rl.learner, temperature=0.9),
    reward=reward.RewardConfig(format_weight=0.25),
  )
  config = with_domains(
    domain("sorting", kl_weight=0.5, **own), domain("calculator")
  )
  first, _, last = config.specialists
  rl, other = config.specialist_rl(first), config.specialist_rl(last)
  assert (rl.rollouts, other.rollouts) == (9, SMOKE.rl.rollouts)
  assert rl.optimizer == own["optimizer"]
  assert other.optimizer == SMOKE.rl.optimizer
  assert rl.learner.temperature == 0.9 and other.learner.temperature == 1
  assert rl.reward == own["reward"]
  # KL weights of all domains go everywhere, the mixture included.
  mixed = config.stage_rl(config.specialists, 3)
  for one in (rl, other, mixed):
    assert one.learner.kl_weight("sorting_chat") == 0.5
    assert one.learner.kl_weight("calculator_chat") == 0


def test_episodes_alone_are_rewarded_for_outcome_and_length():
  penalty = length.LengthPenalty(free_tokens=10, max_tokens=20)
  given = reward.RewardConfig(format_weight=0.5, length=penalty)
  config = dataclasses.replace(
    SMOKE, rl=dataclasses.replace(SMOKE.rl, reward=given)
  )
  *_, last = config.specialists
  assert config.specialist_rl(last).reward == reward.RewardConfig(
    length=penalty
  )
  assert config.stage_rl(config.specialists, 3).reward == given


@pytest.mark.parametrize("penalty", [None, 7])
def test_a_domain_of_episodes_may_have_its_own_penalty_on_length(penalty):
  own = penalty and length.LengthPenalty(free_tokens=1, max_tokens=penalty)
  config = with_domains(
    domain("sorting"),
    domain("calculator", reward=reward.RewardConfig(length=own)),
  )
  *_, last = config.specialists
  rl = config.specialist_rl(last)
  assert rl.episodes.length == rl.reward.length == own
  mixed = config.stage_rl(config.specialists, 3)
  assert mixed.episodes.length == SMOKE.rl.episodes.length != own


@pytest.mark.parametrize("order", ["mixed", "sequential", "both"])
def test_orders_take_as_many_rollouts(order):
  orders = post_training._orders(
    dataclasses.replace(SMOKE, rl_order=order, mixed_rollouts=5)
  )
  want = ["mixed", "sequential"] if order == "both" else [order]
  assert list(orders) == want
  for stages in orders.values():
    assert sum(rollouts for *_, rollouts in stages) == 5
    parts = [one.name for _, some, _ in stages for one in some]
    assert parts == [one.name for one in SMOKE.specialists]
  if "sequential" in orders:
    names = [name for name, *_ in orders["sequential"]]
    assert names == ["sequential_1_reasoning", "sequential_2_agent"]


def reported():
  names = [one.name for one in SMOKE.specialists]

  def row(*values):
    return {"all": sum(values) / 3, **dict(zip(names, values))}

  found = {
    "start": row(0.1, 0.1, 0.1),
    **{name: row(0.5, 0.6, 0.7) for name in names},
    "distilled": row(0.4, 0.5, 0.6),
    "mixed": row(0.6, 0.5, 0.5),
    "sequential_1_reasoning": row(0.8, 0.7, 0.3),
    "sequential_2_agent": row(0.3, 0.6, 0.9),
  }
  return {
    "pass_at_1": found,
    "orders": {
      "mixed": ["distilled", "mixed"],
      "sequential": [
        "distilled",
        "sequential_1_reasoning",
        "sequential_2_agent",
      ],
    },
    "distilled": {
      name: dict(problems=4, answers=8, accepted=3, mixed=2) for name in names
    },
    "seconds": dict.fromkeys(found, 10.0),
  }


def test_forgotten_is_what_the_end_has_lost_of_the_best_before():
  report = reported()
  assert post_training.forgotten(report, "mixed") == pytest.approx(
    {"sorting_thinking": 0.0, "sorting_chat": 0.0, "calculator_chat": 0.1}
  )
  assert post_training.forgotten(report, "sequential") == pytest.approx(
    {"sorting_thinking": 0.5, "sorting_chat": 0.1, "calculator_chat": 0.0}
  )


def test_the_report_has_every_model_in_every_domain():
  text = post_training_report.describe(SMOKE, reported())
  assert "| calculator_chat | 10.0 | 70.0 | 60.0 | 50.0 | 90.0 |" in text
  assert "| mean | 10.0 | 60.0 | 50.0 | 53.3 | 60.0 |" in text
  assert "| sequential_2_agent | 30.0 | 10 |" in text
  assert "| sequential_2_agent | 60.0 | 90.0 | 10 |" in text
  assert "Largest: 50.0 points, of sorting_thinking" in text
  assert "| sorting_chat | 4 | 8 | 3 | 2 |" in text


def test_a_start_learns_solutions_in_the_modes_of_its_domains(tmp_path):
  path = pathlib.Path(tmp_path, "solved.jsonl")
  solved.write(SMOKE, path)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  count = {}
  rl = SMOKE.stage_rl(SMOKE.specialists, 1)
  tokenizer = policy_lib.make_tokenizer(rl)
  assert isinstance(tokenizer, tokenizers.Tokenizer)
  for row in rows:
    name = row["id"].rpartition("-")[0]
    count[name] = count.get(name, 0) + 1
    parts = list(pieces.read(row["pieces"], tokenizer))
    learnt = tokenizer.decode(
      tokenizer.encode_parts([part for part, learn in parts if learn])
    )
    given = "".join(x for x, learn in parts if isinstance(x, str) and not learn)
    if name == "sorting_thinking":
      assert learnt.startswith("With ") and "</think>\\boxed{" in learnt
    if name == "sorting_chat":
      assert learnt.startswith("\\boxed{")
    if name == "calculator_chat":
      # The calls are learnt, what the tools said is given.
      assert "calculate" in learnt and "function_results" not in learnt
      assert "function_results" in given
  assert count == dict.fromkeys((x.name for x in SMOKE.specialists), 12)


def test_a_start_with_too_few_problems_is_told(tmp_path):
  few = with_domains(domain("sorting", solved=3000))
  message = r"domain sorting: solved=3000, but it has \d+ problems"
  with pytest.raises(ValueError, match=message):
    solved.write(few, pathlib.Path(tmp_path, "solved.jsonl"))


@pytest.mark.parametrize("variant", ["full", "speciale", "small"])
def test_every_variant_has_the_problems_that_its_start_sees(variant):
  config = getattr(configs, variant)()
  for one in config.specialists:
    count = one.domain.solved or config.solved
    for task in one.tasks:
      drawn = tasks.generate(task.make(), split="train", seed=config.rl.seed)
      assert len(list(itertools.islice(drawn, count))) == count


def test_grpo_does_not_begin_with_what_the_start_has_seen_solved():
  *_, one = configs.full().specialists[:-2]
  rl = configs.full().specialist_rl(one)
  shown = demonstrations.shown_tasks(one.environments, rl.seed)
  seen = [x.id for x in itertools.islice(shown, 60)]
  drawn = environments.Tasks(one.environments, split="train", seed=rl.seed)
  posed = [drawn.task(number).id for number in range(60)]
  # There are few questions; by one seed all would be the same.
  assert len(set(seen) & set(posed)) < 30
  assert sum(x == y for x, y in zip(seen, posed)) < 6


def test_the_mixture_has_one_program_for_all_stages():
  """Learners that differ would be compiled for every specialist."""
  learners = {SMOKE.specialist_rl(one).learner for one in SMOKE.specialists} | {
    SMOKE.stage_rl(SMOKE.specialists, 2).learner
  }
  assert len(learners) == 1
  assert isinstance(learners.pop(), learner_config.LearnerConfig)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: domain("sorting", name="a b"), "letters, digits and _"),
    (lambda: domain("sorting", task=None), "exactly one of task and env"),
    (lambda: domain("sorting", modes=("chat", "chat")), "must differ"),
    (lambda: domain("sorting", rollouts=0), "rollouts=0 must be positive"),
    (
      lambda: domain("calculator", reward=SMOKE.rl.reward),
      r"of episodes, reward\.length alone",
    ),
    (
      lambda: with_domains(
        *SMOKE.domains,
        rl=dataclasses.replace(
          SMOKE.rl,
          learner=dataclasses.replace(
            SMOKE.rl.learner, domain_kl_weights=(("a", 1.0),)
          ),
        ),
      ),
      r"rl\.learner\.domain_kl_weights=",
    ),
    (with_domains, "must be there"),
    (lambda: with_domains(*SMOKE.domains, domain("sorting")), "each name once"),
    (
      lambda: with_domains(domain("sorting", name="mixed")),
      "name of another part",
    ),
    (
      lambda: with_domains(
        *SMOKE.domains, rl=dataclasses.replace(SMOKE.rl, evaluation=None)
      ),
      r"rl\.evaluation must be set",
    ),
    (
      lambda: with_domains(*SMOKE.domains, mixed_rollouts=1),
      "mixed_rollouts=1 must be at least 2",
    ),
  ],
)
def test_a_wrong_config_is_told(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_groups_come_in_the_papers_order():
  assert post_training_config.GROUPS == ("reasoning", "agent", "alignment")
  assert SMOKE.groups == ("reasoning", "agent")


def test_the_whole_has_every_domain_of_the_paper_in_both_modes():
  config = configs.full()
  names = {one.name for one in config.domains}
  assert names == {
    *("mathematics", "programming", "logic"),
    *("general_agent", "agentic_coding", "agentic_search", "instructions"),
  }
  assert len(config.specialists) == 14
  assert config.groups == post_training_config.GROUPS
  stages = post_training._orders(configs.sequential())["sequential"]
  assert [len(parts) for _, parts, _ in stages] == [6, 6, 2]


def test_speciale_is_reasoning_with_proofs_and_hardly_a_penalty_on_length():
  config, full = configs.speciale(), configs.full()
  assert config.groups == ("reasoning",)
  assert {one.mode for one in config.specialists} == {"thinking"}
  assert config.rl.episodes is None
  (proofs,) = (one for one in config.domains if one.name == "proofs")
  assert proofs.task.kind == "proofs"
  ours, theirs = config.rl.reward.length, full.rl.reward.length
  report = {
    "pass_at_1": {
      name: dict.fromkeys([one.name for one in config.specialists], 0.5)
      for name in [
        *(one.name for one in config.specialists),
        *("start", "distilled", "mixed"),
      ]
    },
    "orders": {"mixed": ["distilled", "mixed"]},
    "distilled": {},
  }
  report["seconds"] = dict.fromkeys(report["pass_at_1"], 1.0)
  assert "Of proofs, the mean of their reward" in (
    post_training_report.describe(config, report)
  )
  assert 0 < ours.weight < theirs.weight / 5
  assert dataclasses.replace(ours, weight=theirs.weight) == theirs


@pytest.mark.parametrize("variant", ["full", "speciale", "small", "smoke"])
def test_every_domain_has_the_problems_that_its_specialists_are_asked(
  variant, tmp_path
):
  config = getattr(configs, variant)()
  post_training.check_enough(config, str(tmp_path))
  few = dataclasses.replace(config, asked=3000)
  with pytest.raises(ValueError, match=r"has \d+ (problems|tasks), not 3000"):
    post_training.check_enough(few, str(tmp_path))
