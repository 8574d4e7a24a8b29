"""The pipeline: seeds, distinctness, the filter, a killed run, the exports."""

import collections
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import psutil
from pyarrow import parquet
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.synthesis.general import campaign
from dsv32_jax.agents.synthesis.general import china
from dsv32_jax.agents.synthesis.general import database
from dsv32_jax.agents.synthesis.general import domains
from dsv32_jax.agents.synthesis.general import export
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.general import planning
from dsv32_jax.agents.synthesis.general import policies
from dsv32_jax.agents.synthesis.general import report
from dsv32_jax.agents.synthesis.general import toolset
from tests.support import general_world as world

TRIP_TOOLS = """get_all_attractions_by_city get_all_cities
get_all_hotels_by_city get_all_restaurants_by_city get_city_by_attraction
get_city_by_hotel get_city_by_restaurant get_city_transport
get_infos_by_attraction get_infos_by_city get_infos_by_hotel
get_infos_by_restaurant get_inter_city_transport get_weather_by_city_date
submit_result"""
TINY = pipeline.SynthesisConfig(
  num_environments=40, num_tasks=80, workers=1, num_trajectories=3
)


def test_the_trip_has_the_paper_s_tools():
  for record, task in world.tasks("trip"):
    names = [tool["name"] for tool in record["tools"]]
    assert sorted(names) == sorted(TRIP_TOOLS.split())
    keys = list(task["answer_schema"]["items"]["properties"])
    assert keys == [
      "time",
      "city",
      "hotel",
      "afternoon_restaurant",
      "afternoon_attraction",
      "evening_restaurant",
    ]


def test_domains_and_pairs_are_many():
  pairs = set()
  assert len({domain.name for domain in domains.DOMAINS}) >= 10
  for index in range(130):
    rng = random.Random(index)
    domain = domains.DOMAINS[index % len(domains.DOMAINS)]
    variant = database.draw_variant(domain, rng)
    rows = database.draw_rows(variant, rng)
    specs = toolset.draw(variant, rng).specs()
    pairs.add(pipeline.pair(rows, [spec.dump() for spec in specs]))
  assert len(pairs) >= 60


def test_rows_are_consistent():
  """Names are unique, parents exist, values lie where they are declared."""
  for domain in domains.DOMAINS:
    rows = database.draw_rows(domain, random.Random(5))
    for table in domain.tables:
      names = [row["name"] for row in rows[table.name]]
      assert len(set(names)) == len(names) >= 5
      above = {row["name"] for row in rows.get(table.parent, ())}
      for row in rows[table.name]:
        assert table.parent is None or row[table.parent] in above
        for column in table.columns:
          value = row[column.name]
          if column.kind == "choice":
            assert value in column.choices
          elif column.kind == "number":
            assert column.low <= value <= column.high
          else:
            assert len(value) == 10 and value > "2025-09"


def test_what_is_good_is_dear():
  rows = database.draw_rows(domains.TRIP, random.Random(0))["hotel"]
  by_price = sorted(rows, key=lambda row: row["price"])
  half = len(by_price) // 2
  stars = [row["stars"] for row in by_price]
  assert sum(stars[half:]) / (len(stars) - half) > sum(stars[:half]) / half


def test_trains_agree_with_the_map():
  """Against great-circle distances, worked out otherwise."""

  def kilometres(a, b):
    lat_a, lon_a, lat_b, lon_b = map(
      math.radians, (*china._FACTS[a][3:], *china._FACTS[b][3:])
    )
    return 6371 * math.acos(
      math.sin(lat_a) * math.sin(lat_b)
      + math.cos(lat_a) * math.cos(lat_b) * math.cos(lon_a - lon_b)
    )

  train = lambda a, b: china.train({"from_city": a, "to_city": b})
  for a in china.CITIES:
    for b in china.CITIES:
      if a < b:
        assert train(a, b) == train(b, a)
        hours = train(a, b)["train_hours"]
        assert abs(hours - max(0.5, kilometres(a, b) / 180)) < 0.35
  assert train("Hangzhou", "Shaoxing")["train_hours"] == 0.5


def test_equal_seeds_equal_environments():
  for index in (0, 7):
    again, _ = pipeline.synthesize(world.CONFIG, index)
    assert again == world.records()[index]
  other = pipeline.SynthesisConfig(seed=4)
  assert pipeline.synthesize(other, 0)[0]["rows"] != world.records()[0]["rows"]


def test_data_that_are_taken_are_drawn_again():
  taken = world.records()[1]["fingerprint"]
  record, _ = pipeline.synthesize(world.CONFIG, 1, known=frozenset([taken]))
  assert record["fingerprint"] != taken
  assert record["rejections"][0]["reason"] == (
    "its data equal those of another"
  )


def test_the_filter_stops_at_the_first_success():
  record, task = world.tasks("find")[0]
  played = []

  def third_time(start, call, rng):
    played.append(rng.random())
    text = json.dumps(task["answer"]) if len(played) == 3 else "{}"
    call("submit_result", {"answer_text": text})

  used = pipeline.solved_after(record, task, third_time, 100, 0.5)
  assert used == 3 and len(set(played)) == 3
  never = lambda start, call, rng: played.append(0)
  played.clear()
  assert pipeline.solved_after(record, task, never, 100, 0.5) is None
  assert len(played) == 100


def test_what_the_policy_never_solves_is_rejected():
  config = pipeline.SynthesisConfig(num_environments=1, num_tasks=1, attempts=2)
  played = collections.Counter()

  def unlucky(start, call, rng):
    """Fails on the first two tasks it meets."""
    played[start.observation] += 1
    if start.observation not in list(played)[:2]:
      policies.searcher(start, call, rng)

  record, _ = pipeline.synthesize(config, 0, unlucky)
  reasons = [rejection["reason"] for rejection in record["rejections"]]
  assert reasons.count("pass@2 is zero") >= 2
  assert len(record["tasks"]) == 1
  assert record["tasks"][0]["attempts_until_solved"] <= 2


def test_easy_policies_fail():
  """Random play stays below 5%, and heuristics of one call below 20%."""
  played, solved = 0, collections.Counter()
  for record in world.records():
    for task in record["tasks"]:
      played += world.CONFIG.baseline_attempts
      solved.update(task["baselines"])
  assert solved["random"] < 0.05 * played
  assert solved["planner"] < 0.05 * played
  assert max(solved["one_list"], solved["one_call"]) < 0.2 * played


def test_a_planner_learns_what_is_true_and_solves_more_than_chance():
  """By the rows themselves; and as the filter it keeps what it solves."""
  record, task = world.tasks("find")[0]
  environment = general.GeneralEnvironment(record, task)
  notes = planning.explore(
    environment.start(), environment.call, random.Random(0)
  )
  rows = {
    row["name"]: row
    for records in record["rows"].values()
    for row in records
    if "name" in row
  }
  assert len(notes.facts) > 5 and set(notes.facts) <= set(rows)
  checked = 0
  for name, known in notes.facts.items():
    for key, value in known.items():
      if key in rows[name]:
        assert rows[name][key] == value
        checked += 1
  assert checked > 10
  solved = sum(
    pipeline.solved_after(record, task, policies.planner, 60, 0.5) is not None
    for record, task in world.tasks("find", "extreme")
  )
  assert solved > 0
  config = pipeline.SynthesisConfig(
    num_environments=1, num_tasks=1, filter="planner", workers=1
  )
  (kept,) = pipeline.synthesize(config, 1)[0]["tasks"]
  assert 1 <= kept["attempts_until_solved"] <= 100


def test_a_solution_is_played_in_few_messages():
  record, task = world.tasks("total")[0]
  messages, reward = export.trajectory(record, task)
  assert reward == 1
  assert len(messages) == 2 + 2 * (task["solution_calls"] + 1)
  # As fine-tuning reads them: every call comes back from the official string.
  text = chat.encode_messages(messages, "chat")
  answers = [x for x in text.split("</think>")[1:] if "function_calls" in x]
  calls = [
    call["function"]
    for answer in answers
    for call in chat.parse_message_from_completion_text(
      answer.split("<\uff5cend\u2581of\u2581sentence\uff5c>")[0], "chat"
    )["tool_calls"]
  ]
  wanted = [
    call["function"]
    for message in messages
    for call in message.get("tool_calls", ())
  ]
  assert [c["name"] for c in calls] == [c["name"] for c in wanted]
  for got, want in zip(calls, wanted, strict=True):
    assert json.loads(got["arguments"]) == json.loads(want["arguments"])


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  whole.mkdir()
  killed.mkdir()
  campaign.run(TINY, whole)
  code = (
    "import pathlib, sys\n"
    "from dsv32_jax.agents.synthesis.general import campaign, pipeline\n"
    "config = pipeline.SynthesisConfig(num_environments=40, num_tasks=80,"
    " workers=2)\n"
    "campaign.run(config, pathlib.Path(sys.argv[1]))\n"
  )
  process = subprocess.Popen([sys.executable, "-c", code, str(killed)])
  path = killed / campaign.ENVIRONMENTS_FILE
  deadline = time.monotonic() + 60
  while not path.exists() or path.read_bytes().count(b"\n") < 4:
    assert time.monotonic() < deadline
    time.sleep(0.005)
  workers = psutil.Process(process.pid).children(recursive=True)
  assert len(workers) >= 2
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert psutil.wait_procs(workers, timeout=20)[1] == []
  assert path.read_bytes().count(b"\n") < 40
  with path.open("ab") as file:
    file.write(b'{"id": "general-')
  two = pipeline.SynthesisConfig(num_environments=40, num_tasks=80, workers=2)
  campaign.run(two, killed)
  want = (whole / campaign.ENVIRONMENTS_FILE).read_bytes()
  assert path.read_bytes() == want
  with pytest.raises(ValueError, match="was made with seed=0, not 1"):
    campaign.run(
      pipeline.SynthesisConfig(seed=1, num_environments=40, num_tasks=80),
      killed,
    )


def test_exports_and_report(tmp_path):
  config = pipeline.SynthesisConfig(
    num_environments=13, num_tasks=30, workers=1
  )
  path = campaign.run(config, tmp_path)
  records = list(campaign.read(path))
  export.export(tmp_path, 3)
  made = [(r, t) for r in records for t in r["tasks"]]
  rows = parquet.read_table(tmp_path / "tasks.parquet").to_pylist()
  assert rows == list(campaign.read(tmp_path / "tasks.jsonl"))
  assert [row["id"] for row in rows] == [task["id"] for _, task in made]
  assert len(rows) == len({row["id"] for row in rows}) == 30
  for row, (record, task) in zip(rows, made):
    assert row["environment"] == record["id"]
    assert row["prompt"] == general.prompt(task)
    assert json.loads(row["answer"]) == task["answer"]
  played = parquet.read_table(tmp_path / "trajectories.parquet").to_pylist()
  assert [row["reward"] for row in played] == [1.0] * 3
  told = list(campaign.read(tmp_path / "rejections.jsonl"))
  assert told == [x for record in records for x in record["rejections"]]
  found = report.report(tmp_path, config.baseline_attempts)
  assert found["tasks"] == sum(found["kinds"].values()) == 30
  assert found["distinct_data"] == found["environments"] == 13
  assert sum(found["rejections"].values()) == len(told)
  assert found["seconds"]["synthesis"] > 0
  assert found["wrong_answers_refused"] == {
    "number": sum(len(task["wrong_answers"]) for _, task in made),
    "fewest_of_a_task": min(len(task["wrong_answers"]) for _, task in made),
  }


@pytest.mark.parametrize(
  "changes",
  [
    {"num_environments": 0},
    {"num_tasks": 3},
    {"num_tasks": 10**6},
    {"attempts": 0},
    {"workers": 0},
    {"filter": "luck"},
    {"baseline_attempts": -1},
    {"num_trajectories": -1},
  ],
)
def test_bad_numbers_are_told(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    pipeline.SynthesisConfig(**changes)


def test_damaged_files_are_named(tmp_path):
  (tmp_path / campaign.ENVIRONMENTS_FILE).write_text('{"a": 1}\n{broken\n')
  with pytest.raises(ValueError, match=r"environments\.jsonl:2: "):
    list(campaign.read(tmp_path / campaign.ENVIRONMENTS_FILE))
  (tmp_path / campaign.CONFIG_FILE).write_text("[]")
  with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
    campaign.run(TINY, tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
  with (tmp_path / campaign.LOCK_FILE).open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another synthesis runs"):
      campaign.run(TINY, tmp_path)
