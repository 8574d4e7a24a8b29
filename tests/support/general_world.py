"""A few synthesised environments, and answers worked out from the text.

The oracle sees a task's text and the plain rows. It knows no query, no SQL and
no tool, so it is independent of solutions and verifiers.
"""

import functools
import itertools
import operator

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.agents.synthesis.general import reading

NUM_ENVIRONMENTS = 26
CONFIG = pipeline.SynthesisConfig(
  seed=3, num_environments=NUM_ENVIRONMENTS, num_tasks=90, workers=1
)
_COMPARE = {
  "ge": operator.ge,
  "le": operator.le,
  "eq": operator.eq,
  "ne": operator.ne,
  "from": operator.ge,
  "until": operator.le,
}


@functools.lru_cache(maxsize=1)
def records():
  """The environments of CONFIG."""
  return [pipeline.synthesize(CONFIG, i)[0] for i in range(NUM_ENVIRONMENTS)]


def tasks(*kinds):
  """Pairs (record, task) of the kinds named."""
  found = [
    (record, task)
    for record in records()
    for task in record["tasks"]
    if task["kind"] in kinds
  ]
  assert found, kinds
  return found


def read(record, task):
  """Reads the text; of the tools only names and descriptions are shown."""
  tools = [
    protocol.ToolSchema(
      name=tool["name"],
      description=tool["description"],
      parameters={"type": "object", "properties": {}},
    )
    for tool in record["tools"]
  ]
  schema = '\n\nSubmit the answer: {"properties": {}}'
  start = protocol.Start(observation=task["statement"] + schema, tools=tools)
  return reading.read(start)


def parents_of(rows):
  """Table -> the table that its rows point to, by the columns' names."""
  return {
    table: next((c for c in records[0] if c in rows and c != table), None)
    for table, records in rows.items()
    if "name" in records[0]
  }


def meeting(record, understood):
  """The rows of the target that meet every condition of the text."""
  rows, target = record["rows"], understood.target
  return [
    row
    for row in rows[target]
    if all(holds(rows, target, row, wish) for wish in understood.wishes)
  ]


def holds(rows, target, row, wish):
  """Tells if a condition, as it was read, holds for a row."""
  compare = lambda seen: _COMPARE[wish.op](seen[wish.column], wish.value)
  if wish.scope == "below":
    below = [r for r in rows[wish.table] if r[target] == row["name"]]
    return sum(map(compare, below)) >= wish.least
  parents, table = parents_of(rows), target
  while table != wish.table:
    above = parents[table]
    row = next(r for r in rows[above] if r["name"] == row[above])
    table = above
  return compare(row)


def is_right(record, task):
  """Returns what tells answers by text and rows, with no verifier."""
  understood, rows = read(record, task), record["rows"]
  if isinstance(understood, reading.TripTask):
    return functools.partial(trip_is_right, rows, understood)
  found = meeting(record, understood)
  measure = understood.details["label"].replace(" ", "_")
  if task["kind"] == "bundle":
    return functools.partial(_bundle_is_right, rows, understood, found, measure)
  down = understood.details.get("order") in ("highest", "desc")
  found = sorted(found, key=lambda row: row[measure], reverse=down)
  if task["kind"] == "total":
    want = [len(found), sum(row[measure] for row in found)]
  elif task["kind"] == "ranking":
    want = [[row["name"] for row in found]]
  else:
    parent = parents_of(rows)[understood.target]
    want = [found[0]["name"], found[0][parent], found[0][measure]]
  return lambda answer: list(answer.values()) == want


def _bundle_is_right(rows, understood, found, measure, answer):
  names, total = answer.values()
  details = understood.details
  by_name = {row["name"]: row for row in found}
  if not set(names) <= set(by_name):
    return False
  chosen = [by_name[name] for name in names]
  parent = parents_of(rows)[understood.target]
  standard = details["standard"].replace(" ", "_")
  size = int(details["size"])
  dear = any(row[measure] > int(details["limit"]) for row in chosen)
  low = any(row[standard] < float(details["required"]) for row in chosen)
  return (
    len(chosen) == len({row[parent] for row in chosen}) == size
    and sum(row[measure] for row in chosen) == total
    and total <= int(details["budget"])
    and not (dear and low)
  )


def keeps_rule(rule, hotel, lunch, dinner, ticket):
  """The conditional budget of a trip's day, by the paper's three cases."""
  meals, both, dear, one, middle, low = rule
  stars = (lunch["stars"], dinner["stars"])
  if hotel["price"] >= 800:
    return (
      lunch["price"] + dinner["price"] < meals
      and min(stars) >= both
      and ticket < dear
    )
  if hotel["price"] >= 500:
    return max(stars) >= one and ticket < middle
  return max(stars) >= low


def trip_is_right(rows, trip, plan):
  """Tells if a plan keeps all that a trip's text asks for."""
  find = lambda table, name: next(
    (r for r in rows[table] if r["name"] == name), None
  )
  if tuple(day["time"] for day in plan) != trip.days:
    return False
  cities = [day["city"] for day in plan]
  if cities[0] != trip.first_city or len(set(cities)) < 3:
    return False
  total = 0
  for number, day in enumerate(plan, 1):
    hotel = find("hotel", day["hotel"])
    lunch = find("restaurant", day["afternoon_restaurant"])
    dinner = find("restaurant", day["evening_restaurant"])
    visit = find("attraction", day["afternoon_attraction"])
    places = (hotel, lunch, dinner, visit)
    if None in places or lunch is dinner:
      return False
    if any(place["city"] != day["city"] for place in places):
      return False
    if number in trip.rules and not keeps_rule(
      trip.rules[number], hotel, lunch, dinner, visit["ticket"]
    ):
      return False
    skies = [
      row["sky"]
      for row in rows["weather"]
      if (row["city"], row["date"]) == (day["city"], day["time"])
    ]
    if trip.dry and skies == ["rain"]:
      return False
    total += hotel["price"] + lunch["price"] + dinner["price"] + visit["ticket"]
  trains = {
    (row["from_city"], row["to_city"]): row["train_hours"]
    for row in rows["inter_city_transport"]
  }
  fast = all(trains[leg] <= trip.hours for leg in itertools.pairwise(cities))
  return fast and total <= trip.total
