"""The study of context management: what is counted, and what each keeps."""

import asyncio
import dataclasses
import json
import random

from matplotlib import image
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import context_study
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import search
from dsv32_jax.agents.synthesis.search import campaign
from dsv32_jax.agents.synthesis.search import pipeline
from dsv32_jax.agents.synthesis.search import reader
from dsv32_jax.data import tokenizer as tokenizers

TASKS = pipeline.SearchSynthesisConfig(
  num_tasks=3, num_helpful=0, modules=("email", "http"), workers=1
)
WIDE = context_study.StudyConfig(
  num_tasks=3, window=120_000, turns=100, parallel=(2,)
)
NARROW = dataclasses.replace(WIDE, window=5000)
LIMITS = search.SearchLimits(page_chars=16_000, hits=5)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  campaign.run(TASKS, folder)
  lines = (folder / "candidates.jsonl").read_text().splitlines()
  kept = [row for row in map(json.loads, lines) if not row["reason"]]
  index = campaign.open_corpus(TASKS, folder)
  tokenizer = tokenizers.train((x.text for x in index.documents()), 2048)
  yield kept, index, tokenizer
  index.close()


def study(tasks, config, path):
  kept, index, tokenizer = tasks
  return context_study.run(
    config,
    kept,
    lambda name: policies.ScriptedPolicy(
      reader.script(random.Random(name)), tokenizer
    ),
    lambda task: search.SearchEnvironment(index, task, limits=LIMITS),
    path,
  )


@pytest.fixture(scope="module")
def wide(tasks, tmp_path_factory):
  path = tmp_path_factory.mktemp("wide") / "episodes.jsonl"
  return study(tasks, WIDE, path), path


@pytest.fixture(scope="module")
def narrow(tasks, tmp_path_factory):
  return study(tasks, NARROW, tmp_path_factory.mktemp("narrow") / "e.jsonl")


def of(rows, strategy):
  return [row for row in rows if row["strategy"] == strategy]


def test_where_nothing_overflows_all_are_one(wide):
  rows, _ = wide
  for strategy in ("summary", "discard_75", "discard_all"):
    for one, other in zip(of(rows, "none"), of(rows, strategy), strict=True):
      assert one["messages"] == other["messages"]
      assert one["tokens_read"] == other["tokens_read"]
  (summary, *_) = context_study.summarize(rows)
  assert summary["score"] == 100.0 and summary["overflowed"] == 0.0


@pytest.mark.slow
def test_tokens_are_those_of_every_prompt(wide, tasks):
  """Against prompts written anew from the messages alone."""
  rows, _ = wide
  tokenizer = tasks[2]
  for row in of(rows, "none"):
    prompts, written = [], 0
    for place, message in enumerate(row["messages"]):
      if message["role"] != "assistant":
        continue
      before = row["messages"][:place]
      text = chat.encode_messages(before, "thinking")
      prompts.append(len(tokenizer.encode_rendered(text)))
      text = chat.encode_messages([message], "thinking", context=before)
      written += len(tokenizer.encode_rendered(text))
    assert row["steps"] == row["num_turns"] == len(prompts)
    assert row["tokens_read"] == sum(prompts)
    assert row["longest_prompt"] == max(prompts)
    assert row["tokens_written"] == row["num_written_tokens"] == written


@pytest.mark.slow
def test_a_narrow_window_is_never_left(narrow):
  assert max(row["longest_prompt"] for row in narrow) <= NARROW.window
  found = {x["strategy"]: x for x in context_study.summarize(narrow)}
  assert found["none"]["overflowed"] == 1.0
  assert found["none"]["score"] < found["summary"]["score"]
  for strategy in ("summary", "discard_75", "discard_all"):
    assert found[strategy]["context_changes"] > 0
    assert found[strategy]["steps"] > found["none"]["steps"]


@pytest.mark.slow
def test_parallel_pays_for_all_and_takes_the_shortest(wide, tasks):
  rows, _ = wide
  kept, index, tokenizer = tasks
  for task, row in zip(kept, of(rows, "parallel_2"), strict=True):
    alone = []
    for number in range(2):
      rng = random.Random(f"{WIDE.seed}/{task['id']}/{number}")
      policy = policies.ScriptedPolicy(reader.script(rng), tokenizer)
      episode = asyncio.run(
        loop.run_episode(
          policy,
          lambda task=task: search.SearchEnvironment(
            index, task, limits=LIMITS
          ),
          episode_id="alone",
        )
      )
      alone.append(episode.result)
    assert row["steps"] == sum(x.num_turns for x in alone)
    assert row["tokens_written"] == sum(x.num_written_tokens for x in alone)
    assert row["num_turns"] == min(x.num_turns for x in alone)


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(wide, tasks, tmp_path):
  rows, path = wide
  lines = path.read_bytes().splitlines(keepends=True)
  half = tmp_path / "episodes.jsonl"
  half.write_bytes(b"".join(lines[:7]) + lines[7][:50])
  again = study(tasks, WIDE, half)
  for row in (*rows, *again):
    row.pop("seconds", None)
  assert again == rows


def test_the_reader_goes_by_its_notes(tasks):
  """What its summary says it does not look for again."""
  kept, _, _ = tasks
  task = kept[0]
  first = task["evidence"][0]["document"]
  notes = f"\n\nFound: {first} Not it: a.B c.D"
  messages = [
    {"role": "system", "content": ""},
    {"role": "user", "content": search.prompt(task) + notes},
  ]
  reply = reader.script(random.Random(0))(messages)
  ((name, text),) = chat.tool_calls(reply)
  assert (name, json.loads(text)["document"]) == ("open", first)
  messages += [{"role": "user", "content": "Sum up."}]
  reply = reader.script(random.Random(0))(messages)
  assert reply["content"] == notes.strip()


def test_the_curve_of_budgets():
  rows = [
    {"steps": 2, "reward": 1.0},
    {"steps": 6, "reward": 1.0},
    {"steps": 9, "reward": 0.0},
    {"steps": 3, "reward": 0.5},
  ]
  curve = context_study.budget_curve(rows, [1, 3, 10])
  assert curve == [(1.0, 0.0), (2.75, 37.5), (5.0, 62.5)]


def test_the_table_and_the_plot(wide, tmp_path):
  rows, _ = wide
  text = context_study.table(context_study.summarize(rows))
  assert text.count("\n") == 2 + len(context_study.names(WIDE))
  assert text.startswith("| strategy | tasks | score |")
  context_study.plot(rows, tmp_path / "study.png")
  pixels = image.imread(tmp_path / "study.png")
  assert pixels.shape[0] > 400
  assert len({tuple(row) for row in pixels[::5, ::5].reshape(-1, 4)}) > 6


def test_mistakes(tasks, tmp_path):
  with pytest.raises(ValueError, match="only 3 tasks"):
    config = dataclasses.replace(WIDE, num_tasks=4)
    study(tasks, config, tmp_path / "e.jsonl")
  with pytest.raises(ValueError, match="parallel"):
    dataclasses.replace(WIDE, parallel=(1,))
  with pytest.raises(ValueError, match="go together"):
    context_study.ProgramConfig(study=WIDE, tasks=TASKS, model="m")
  with pytest.raises(ValueError, match=r"tasks\.num_tasks=2 is below"):
    few = dataclasses.replace(TASKS, num_tasks=2)
    context_study.ProgramConfig(study=WIDE, tasks=few)
