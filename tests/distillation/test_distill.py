"""Specialists that answer by script, and the program on a real checkpoint."""

import asyncio
import dataclasses
import json
import subprocess
import sys

import pytest

from dsv32_jax.agents import cold_start
from dsv32_jax.agents import limits
from dsv32_jax.agents import policy as policies
from dsv32_jax.data import pieces as pieces_lib
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.distillation import config as config_lib
from dsv32_jax.distillation import distill
from dsv32_jax.distillation import episodes
from dsv32_jax.distillation import mix
from dsv32_jax.distillation import sampling
from dsv32_jax.generation import programs
from dsv32_jax.generation import requests
from dsv32_jax.rl import episode_config
from dsv32_jax.rl import episodes as rl_episodes
from dsv32_jax.training import model_checkpoint
from dsv32_jax.verifiers import reward
from dsv32_jax.verifiers import tasks
from dsv32_jax.verifiers.tasks import mixture
from dsv32_jax.verifiers.tasks import problem as problem_lib
from tests.support import models

SORTING = mixture.TaskConfig(kind="sorting", size=3, largest=9)
ENGINE = programs.EngineConfig(
  max_batch=4, page_size=16, num_pages=64, prefill_chunk=32, max_length=128
)


@pytest.fixture(scope="module")
def tokenizer():
  texts = [
    problem.question + problem.answer + problem.reasoning
    for problem, _ in zip(
      tasks.generate(SORTING.make(), split="train", seed=5), range(50)
    )
  ]
  return tokenizers.train(texts, vocab_size=330)


def specialist(name="sorter", **changes):
  given = dict(checkpoint="none", tasks=(SORTING,), problems=4)
  return config_lib.SpecialistConfig(name=name, **(given | changes))


def config_of(*specialists, **changes):
  given = dict(tokenizer="none", engine=ENGINE, max_tokens=64, answers=2)
  return config_lib.DistillConfig(specialists=specialists, **(given | changes))


def scripted(tokenizer, answer, *, finish="stop"):
  """An engine that answers with `answer(problem, number of the request)`."""
  known = {}
  for task in ("train", "held_out"):
    for problem, _ in zip(
      tasks.generate(SORTING.make(), split=task, seed=0), range(300)
    ):
      known[problem.question] = problem

  def generate(asked):
    done = []
    for number, request in enumerate(asked):
      prompt = tokenizer.decode(request.prompt_ids)
      (problem,) = (p for q, p in known.items() if q in prompt)
      ids = []
      for part in answer(problem, number):
        special = part == "</think>"
        ids += (
          [tokenizer.special_id("think_end")]
          if special
          else tokenizer.encode(part)
        )
      ids.append(tokenizer.eos_id)
      done.append(
        requests.Completion(
          request_id=str(number),
          prompt_ids=tuple(request.prompt_ids),
          token_ids=tuple(ids),
          logprobs=(0.0,) * len(ids),
          finish_reason=finish,
          kept=(None,) * len(ids),
        )
      )
    return done

  return generate


def judged(one, config, tokenizer, generate):
  with reward.Rewarder(reward.RewardConfig(thinking=one.thinking)) as rewarder:
    return sampling.sample(one, config, tokenizer, generate, rewarder)


def right(problem, number):
  return [f"\\boxed{{{problem.answer}}}"]


def test_right_answers_stay_and_wrong_ones_go(tokenizer):
  one = specialist()
  config = config_of(one)

  def answer(problem, number):
    return right(problem, number) if number % 2 else ["\\boxed{1}"]

  samples = judged(one, config, tokenizer, scripted(tokenizer, answer))
  assert [s.reason for s in samples] == ["it is wrong", ""] * 4
  assert len({s.id for s in samples}) == 8
  problems = sampling.problems_of(one, config.seed)
  for sample, problem in zip(samples[1::2], problems):
    assert sample.messages == [
      {"role": "user", "content": problem.question},
      {"role": "assistant", "content": f"\\boxed{{{problem.answer}}}"},
    ]
    assert not problem_lib.is_held_out(problem)


def test_a_thinking_specialist_must_think_in_the_format(tokenizer):
  one = specialist(thinking=True)
  config = config_of(one)
  ways = [
    lambda right: ["let me see", "</think>", right],
    lambda right: ["</think>", right],
    lambda right: ["let me see ", right],
    lambda right: ["a", "</think>", right, "</think>", right],
  ]

  def answer(problem, number):
    return ways[number % 4](f"\\boxed{{{problem.answer}}}")

  config = dataclasses.replace(config, answers=4)
  samples = judged(one, config, tokenizer, scripted(tokenizer, answer))
  thought, silent, endless, twice = samples[:4]
  assert thought.reason == ""
  assert thought.messages[1]["reasoning_content"] == "let me see"
  assert silent.reason == "it does not think"
  assert "the chat format" in endless.reason or "wrong" in endless.reason
  assert "the chat format" in twice.reason or "wrong" in twice.reason


def test_what_was_cut_off_is_no_example(tokenizer):
  one = specialist()
  generate = scripted(tokenizer, right, finish="length")
  samples = judged(one, config_of(one), tokenizer, generate)
  assert {s.reason for s in samples} == {"it was cut off"}


def test_draws_have_seeds_of_their_own(tokenizer):
  one, other, asked = specialist(), specialist("other"), []

  def generate(given):
    asked.extend(request.sampling.seed for request in given)
    return scripted(tokenizer, right)(given)

  config = config_of(one, other)
  judged(one, config, tokenizer, generate)
  judged(other, config, tokenizer, generate)
  assert len(set(asked)) == 16
  first = list(asked)
  judged(one, config, tokenizer, generate)
  assert asked[16:] == first[:8]


def test_episodes_are_kept_whole_where_they_are_solved(tokenizer, monkeypatch):
  given = episode_config.EpisodesConfig(
    environments=(
      episode_config.EnvironmentConfig(kind="calculator", size=2, largest=9),
    ),
    limits=limits.EpisodeLimits(turns=4),
    tool_descriptions="signatures",
  )
  one = specialist("agent", tasks=(), episodes=given)
  config = config_of(one, answers=3)
  model = models.tiny_config(vocab_size=tokenizer.vocab_size + 2)
  asked = []

  def scripted_play(engine, tokenizer, config, tasks, drawn):
    """Of three episodes one is solved, one is cut short, one thinks."""
    asked.extend(x.seed for x in drawn)
    size = tokenizer.vocab_size
    assert {x.banned_ids for x in drawn} == {(size, size + 1)}
    played = []
    for number, task in enumerate(tasks):
      calls = task.solve()
      calls = calls[:-1] if number % 3 == 1 else calls
      thought = "let me see" if number % 3 == 2 else ""
      script = policies.replies(
        *(
          policies.call(x.name, json.dumps(x.arguments), reasoning=thought)
          for x in calls
        ),
        {"role": "assistant", "content": "Done."},
      )
      policy = policies.ScriptedPolicy(script)
      played.append(asyncio.run(rl_episodes.play(config, policy, task)))
    return played

  monkeypatch.setattr(rl_episodes, "play_all", scripted_play)
  samples = episodes.sample(one, config, tokenizer, None, model)
  assert [s.reason for s in samples] == [
    "",
    "its reward is too low",
    "it thinks",
  ] * 4
  assert len(set(asked)) == len({s.id for s in samples}) == 12
  thinking = dataclasses.replace(one, thinking=True)
  samples = episodes.sample(thinking, config, tokenizer, None, model)
  assert [s.reason for s in samples] == [
    "it does not think first",
    "its reward is too low",
    "",
  ] * 4
  chosen, _ = mix.choose(samples, 1)
  rows = [distill._row(x) for x in chosen]
  assert len(rows) == 4
  for row in rows:
    parts = list(pieces_lib.read(row["pieces"], tokenizer))
    learnt = tokenizer.decode(
      tokenizer.encode_parts([x for x, learn in parts if learn])
    )
    assert learnt.startswith("let me see") and "submit" in learnt
    # What a tool said is read, not learnt.
    assert "function_results" not in learnt
    given_text = "".join(
      x for x, learn in parts if isinstance(x, str) and not learn
    )
    assert "function_results" in given_text


def test_everything_is_mixed_where_it_is_said():
  config = config_of(specialist("a"), specialist("b"), everything=True)
  chosen = [made("a", "t", str(n), "x") for n in range(10)]
  mixed = mix.mix(chosen, config)
  assert sorted(x.id for x in mixed) == sorted(x.id for x in chosen)
  assert mixed != chosen and mix.mix(chosen, config) == mixed
  with pytest.raises(ValueError, match="no answer of any specialist"):
    mix.mix([], config)


def made(name, task, problem, answer, *, tokens=5, reason=""):
  return sampling.Sample(
    id=f"{name}-{problem}-{answer}",
    specialist=name,
    task=task,
    problem=problem,
    thinking=False,
    num_tokens=tokens,
    reason=reason,
    messages=[{"role": "user", "content": problem}, {"content": answer}],
  )


def test_the_shortest_answers_of_a_problem_are_chosen():
  samples = [
    made("a", "t", "p", "long", tokens=9),
    made("a", "t", "p", "short", tokens=2),
    made("a", "t", "p", "wrong", tokens=1, reason="it is wrong"),
    made("a", "t", "q", "same", tokens=4),
    dataclasses.replace(made("a", "t", "q", "same", tokens=4), id="again"),
  ]
  chosen, left_out = mix.choose(samples, 1)
  assert [one.id for one in chosen] == ["a-p-short", "a-q-same"]
  assert dict(left_out) == {
    "a-p-long": "there are enough of its problem",
    "a-p-wrong": "it is wrong",
    "again": "it is there already",
  }


@pytest.mark.parametrize(
  "examples,counts", [(None, (10, 5)), (6, (4, 2)), (100, (10, 5))]
)
def test_a_mixture_keeps_its_proportions(examples, counts):
  config = config_of(
    specialist("a", weight=2.0), specialist("b"), examples=examples
  )
  chosen = [made("a", "t", str(n), "x") for n in range(10)]
  chosen += [made("b", "t", str(n), "x") for n in range(20)]
  mixed = mix.mix(chosen, config)
  found = tuple(sum(s.specialist == name for s in mixed) for name in "ab")
  assert found == counts
  assert len({one.id for one in mixed}) == len(mixed)
  assert mix.mix(chosen, config) == mixed
  with pytest.raises(ValueError, match="no answer of specialist 'b'"):
    mix.mix(chosen[:10], config)


def test_examples_are_what_fine_tuning_reads(tokenizer):
  one = specialist(thinking=True)
  config = config_of(one)

  def answer(problem, number):
    return ["think", "</think>", f"\\boxed{{{problem.answer}}}"]

  sample = judged(one, config, tokenizer, scripted(tokenizer, answer))[0]
  rows = json.dumps(cold_start.pieces(sample.messages, "thinking"))
  parts = [part for part, learn in pieces_lib.read(rows, tokenizer) if learn]
  learnt = tokenizer.encode_parts(parts)
  assert tokenizer.decode(learnt).startswith("think</think>\\boxed{")
  assert learnt[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
  "make,told",
  [
    (config_of, "must be there, each name once"),
    (lambda: config_of(specialist(), specialist()), "each name once"),
    (lambda: config_of(specialist(), answers=0), "answers=0"),
    (lambda: config_of(specialist(), temperature=-1.0), "temperature=-1"),
    (lambda: specialist("a b"), "letters, digits and _"),
    (lambda: specialist(problems=0), "ask nothing"),
    (lambda: specialist(tasks=()), "exactly one of them"),
    (
      lambda: config_of(specialist(), everything=True, examples=3),
      "exclude each other",
    ),
    (lambda: specialist(weight=0.0), "weight=0.0"),
  ],
)
def test_a_wrong_config_is_told(make, told):
  with pytest.raises(ValueError, match=told):
    make()


def test_a_task_with_too_few_problems_is_told():
  few = mixture.TaskConfig(kind="sorting", size=2, largest=1)
  with pytest.raises(ValueError, match=r"sorter: sorting has \d+ problems"):
    sampling.problems_of(specialist(tasks=(few,), problems=50), 0)


@pytest.mark.slow
def test_the_program_draws_once_and_tells_who_solved_nothing(
  tokenizer, tmp_path
):
  model = models.tiny_model(vocab_size=tokenizer.vocab_size)
  model_checkpoint.save_model(model, tmp_path / "checkpoints")
  tokenizer.save(tmp_path / "tokenizer.json")
  command = [
    *(sys.executable, "-m", "experiments.distill"),
    "--config=configs/distill.py",
    f"--workdir={tmp_path / 'out'}",
    f"--config.tokenizer={tmp_path / 'tokenizer.json'}",
    "--config.answers=1",
    "--config.max_tokens=8",
  ]
  for place in range(2):
    path = f"--config.specialists[{place}]"
    command += [
      f"{path}.checkpoint={tmp_path / 'checkpoints'}",
      f"{path}.problems=2",
    ]
  finished = subprocess.run(
    command, check=False, capture_output=True, text=True, timeout=280
  )
  # Random weights solve nothing; that is said, and nothing drawn is lost.
  assert finished.returncode == 1
  (line,) = finished.stderr.strip().splitlines()[-1:]
  assert line == "error: no answer of specialist 'sorting' was accepted"
  rows = (tmp_path / "out" / "rejections.jsonl").read_text().splitlines()
  assert len(rows) == 4
  before = (tmp_path / "out" / "samples-sorting.jsonl").stat().st_mtime_ns
  subprocess.run(command, check=False, capture_output=True, timeout=280)
  after = (tmp_path / "out" / "samples-sorting.jsonl").stat().st_mtime_ns
  assert before == after
