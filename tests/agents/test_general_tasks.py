"""Tasks: the text alone gives the answer, the verifier takes no other."""

import itertools
import json
import random

import jsonschema
import pytest

from dsv32_jax.agents.environments import general
from dsv32_jax.agents.synthesis import authoring
from dsv32_jax.agents.synthesis.general import reading
from dsv32_jax.agents.synthesis.general import tasks as tasks_lib
from tests.support import general_damage
from tests.support import general_world as world

QUERIES = ("find", "extreme", "total", "ranking")


def open_task(record, task):
  return general.GeneralEnvironment(record, task)


def accepts(environment, answer):
  return environment.judge.accepts(json.loads(json.dumps(answer)))


@pytest.mark.parametrize("kind", QUERIES)
def test_the_text_and_the_rows_give_the_answer(kind):
  for record, task in world.tasks(kind):
    understood = world.read(record, task)
    assert understood.kind == kind
    assert world.is_right(record, task)(task["answer"]), task["statement"]


def test_one_row_meets_all_conditions_and_none_is_idle():
  for record, task in world.tasks("find"):
    understood, rows = world.read(record, task), record["rows"]
    target = understood.target
    assert len(world.meeting(record, understood)) == 1
    assert len(understood.wishes) >= task["level"] + 1 >= 3
    for wish in understood.wishes:
      kept = [r for r in rows[target] if world.holds(rows, target, r, wish)]
      others = [w for w in understood.wishes if w != wish]
      more = [
        row
        for row in rows[target]
        if all(world.holds(rows, target, row, other) for other in others)
      ]
      assert len(kept) >= 3
      assert len(more) > 1, task["statement"]


def test_the_verifier_takes_one_row_of_the_table():
  for record, task in world.tasks("find", "extreme"):
    environment = open_task(record, task)
    target, parent, measure = task["answer"]
    told = [
      {target: r["name"], parent: r[parent], measure: r[measure]}
      for r in record["rows"][target]
    ]
    assert [t for t in told if accepts(environment, t)] == [task["answer"]]


def test_bundles_by_brute_force():
  """Every choice of two rows, and random choices of more."""
  rng, seen = random.Random(0), {True: 0, False: 0}
  for record, task in world.tasks("bundle"):
    environment, understood = (
      open_task(record, task),
      world.read(record, task),
    )
    is_right = world.is_right(record, task)
    size, target = int(understood.details["size"]), understood.target
    label = understood.details["label"].replace(" ", "_")
    rows = record["rows"][target]
    choices = itertools.combinations(rows, 2) if size == 2 else ()
    choices = [*choices, *(rng.sample(rows, size) for _ in range(300))]
    names = task["answer"][next(iter(task["answer"]))]
    choices.append([r for r in rows if r["name"] in names])
    for chosen in choices:
      key, total = next(iter(task["answer"])), sum(r[label] for r in chosen)
      answer = {key: [row["name"] for row in chosen], "total": total}
      right = is_right(answer)
      assert accepts(environment, answer) == right, task["statement"]
      seen[right] += 1
  assert seen[True] > 20 and seen[False] > 1000


def test_trips_against_the_text():
  """Near misses of the right plan, and random days in its cities."""
  rng, seen = random.Random(1), {True: 0, False: 0}
  for record, task in world.tasks("trip"):
    rows, environment = record["rows"], open_task(record, task)
    trip = world.read(record, task)
    assert isinstance(trip, reading.TripTask) and trip.rules
    plans = [task["answer"]]
    for _ in range(1500):
      plan = [dict(day) for day in task["answer"]]
      for _ in range(rng.randint(1, 3)):
        day = rng.choice(plan)
        key = rng.choice([k for k in day if k != "time"])
        table = key.rpartition("_")[2]
        same = [r for r in rows[table] if r.get("city") == day["city"]]
        day[key] = rng.choice(same or rows[table])["name"]
      plans.append(plan)
    for plan in plans:
      right = world.trip_is_right(rows, trip, plan)
      assert accepts(environment, plan) == right, task["statement"]
      seen[right] += 1
  assert seen[True] > 20 and seen[False] > 500


def test_wrong_answers_are_well_formed_many_and_refused():
  for record, task in world.tasks(*QUERIES, "bundle", "trip"):
    environment = open_task(record, task)
    validator = jsonschema.Draft202012Validator(task["answer_schema"])
    wrong = task["wrong_answers"]
    assert len(wrong) >= tasks_lib.MIN_WRONG_ANSWERS
    assert len({json.dumps(answer) for answer in wrong}) == len(wrong)
    for answer in wrong:
      assert validator.is_valid(answer)
      assert not accepts(environment, answer)
    assert accepts(environment, task["answer"])


def damaged(value, rng):
  """A right answer with one of its values, or of its lists, changed."""
  if isinstance(value, dict):
    key = rng.choice(list(value))
    return {**value, key: damaged(value[key], rng)}
  if isinstance(value, list):
    place = rng.randrange(len(value))
    changed = [*value[:place], damaged(value[place], rng), *value[place + 1 :]]
    return rng.choice(
      (changed, [*value, value[place]], value[:-1], [value], value * 2, [])
    )
  if isinstance(value, str):
    forms = (value.upper(), value + " ", "", "%", f"{value}' OR '1'='1", 0)
    return rng.choice([x for x in forms if x != value])
  return rng.choice(
    (value + 1, -value - 1, value + 0.5, True, str(value), None)
  )


def test_a_damaged_answer_is_wrong():
  rng, tried = random.Random(2), 0
  for record, task in world.tasks(*QUERIES, "bundle", "trip"):
    environment = open_task(record, task)
    for _ in range(80):
      answer = damaged(task["answer"], rng)
      assert not accepts(environment, answer), (task["statement"], answer)
      tried += 1
  assert tried > 5000


def test_what_is_near_the_answer_counts_by_its_meaning():
  """Well-formed ones: refused if the text and the rows say that they err."""
  rng, seen = random.Random(4), {True: 0, False: 0}
  for record, task in world.tasks(*QUERIES, "bundle", "trip"):
    judge, is_right = (
      open_task(record, task).judge,
      world.is_right(record, task),
    )
    for _ in range(25):
      answer = general_damage.near(record, task, rng)
      assert judge.fits(answer)
      right = is_right(answer)
      assert judge.accepts(answer) == right, (task["statement"], answer)
      # The others have one right answer.
      if right and answer != task["answer"]:
        assert task["kind"] in ("bundle", "trip")
      seen[right] += 1
  assert seen[True] > 100 and seen[False] > 1500


def test_an_integer_is_written_as_one():
  record, task = world.tasks("total")[0]
  environment = open_task(record, task)
  floats = {key: float(value) for key, value in task["answer"].items()}
  assert accepts(environment, task["answer"])
  assert not accepts(environment, floats)


def test_no_task_tells_its_answer():
  for _, task in world.tasks(*QUERIES, "bundle", "trip"):
    text = general.prompt(task)
    assert not authoring.tells_answer(text, task["answer"])
  assert authoring.tells_answer("It is Rue 7, or 9.", {"a": ["rue 7"], "b": 9})
  assert not authoring.tells_answer("It is 9.5 or Rue 71.", ["Rue 7", 9])


def test_difficulty_rises_and_tools_are_added():
  added = []
  for _, task in world.tasks(*QUERIES, "bundle", "trip"):
    levels = [step["level"] for step in task["history"]]
    assert levels == list(range(1, task["level"] + 1)) and len(levels) >= 2
    assert task["history"][-1]["solution_calls"] == task["solution_calls"] > 5
    added += [tool for step in task["history"] for tool in step["added_tools"]]
  assert added
