"""How the searching policy gathers rows through tools and chooses among them.

Everything it knows came out of a tool's observation.
"""

import itertools
import json
from typing import Any

from dsv32_jax.agents.synthesis.general import conditions
from dsv32_jax.agents.synthesis.general import reading

# Chances, in each attempt, to miss a condition, and each row.
MISS_CONDITION = 0.08
MISS_ROW = 0.004
_CHOICES = 1500
_CITY_PAIRS = 30
_HOLDS = {
  ">=": lambda a, b: a >= b,
  "<=": lambda a, b: a <= b,
  "==": lambda a, b: a == b,
  "!=": lambda a, b: a != b,
}


class _Lost(Exception):
  """The tools at hand do not tell what the reading asks for."""


def answer(task: reading.Task, call, rng) -> Any:
  """Returns an answer to a query or a bundle, or None if none was found."""
  kept = [w for w in task.wishes if rng.random() > MISS_CONDITION]
  try:
    found = _Search(task, kept, call, rng).rows()
  except _Lost:
    return None
  if not found:
    return None
  measure = reading.column(task.details["label"])
  if task.kind == "bundle":
    return _bundle(task, found, measure, rng)
  if task.kind == "total":
    total = sum(row[measure] for row in found)
    return dict(zip(task.answer_keys, (len(found), total)))
  down = task.details.get("order") in ("highest", "desc")
  found.sort(key=lambda row: row[measure], reverse=down)
  if task.kind == "ranking":
    return {task.answer_keys[0]: [row["name"] for row in found]}
  best = found[0]
  return dict(
    zip(task.answer_keys, (best["name"], best["parent"], best[measure]))
  )


class _Search:
  """Walks from the root table to the target."""

  def __init__(self, task, wishes, call, rng):
    self._task = task
    self._call = call
    self._rng = rng
    self._own = [w for w in wishes if w.scope != "below"]
    self._below = [w for w in wishes if w.scope == "below"]
    self._columns = [reading.column(task.details["label"])]
    if "standard" in task.details:
      self._columns.append(reading.column(task.details["standard"]))

  def rows(self):
    chain, table = [], self._task.target
    while table is not None:
      if table not in self._task.ways:
        raise _Lost(table)
      chain.insert(0, table)
      table = self._task.ways[table].parent
    return list(self._walk(chain, None))

  def _walk(self, chain, parent):
    table, target = chain[0], len(chain) == 1
    wishes = [w for w in self._own if w.table == table]
    columns = [w.column for w in wishes] + (self._columns if target else [])
    for name in self._names(table, parent):
      if self._rng.random() < MISS_ROW:
        continue
      infos = self._infos(table, name, columns)
      if not all(_holds(wish, infos) for wish in wishes):
        continue
      if not target:
        yield from self._walk(chain[1:], name)
      elif all(self._enough(wish, name) for wish in self._below):
        yield {**infos, "name": name, "parent": parent}

  def _enough(self, wish, name):
    below = [
      self._infos(wish.table, child, [wish.column])
      for child in self._names(wish.table, name)
    ]
    return sum(_holds(wish, infos) for infos in below) >= wish.least

  def _names(self, table, parent):
    if table not in self._task.ways:
      raise _Lost(table)
    way = self._task.ways[table]
    given = {way.parent: parent} if way.parent else {}
    free = [p for p in way.lister.parameters["properties"] if p != way.parent]
    if not free:
      return _ask(self._call, way.lister.name, given)
    if free == ["page"]:
      first = _ask(self._call, way.lister.name, given | {"page": 1})
      names = list(first["names"])
      for page in range(2, first["pages"] + 1):
        more = _ask(self._call, way.lister.name, given | {"page": page})
        names += more["names"]
      return names
    values = way.lister.parameters["properties"][free[0]]["enum"]
    return [
      name
      for value in values
      for name in _ask(self._call, way.lister.name, given | {free[0]: value})
    ]

  def _infos(self, table, name, columns):
    infos = {}
    for tool in self._task.ways[table].informers if columns else ():
      properties = tool.parameters["properties"]
      if "info_keywords" in properties:
        known = properties["info_keywords"]["items"]["enum"]
        wanted = [c for c in dict.fromkeys(columns) if c in known]
        infos |= _ask(
          self._call, tool.name, {"info_keywords": wanted, table: name}
        )
      elif tool.name == f"describe_{table}":
        infos |= _ask(self._call, tool.name, {table: name})
      else:
        for column in columns:
          if tool.name == f"get_{column}_of_{table}":
            infos[column] = _ask(self._call, tool.name, {table: name})
    if any(column not in infos for column in columns):
      raise _Lost(table)
    return infos


def plan_trip(task: reading.TripTask, call, rng) -> Any:
  """Returns a plan that keeps what was read, or None if none was found."""
  rules = {day: rule for day, rule in task.rules.items() if rng.random() > 0.05}
  cities = [c for c in _ask(call, "get_all_cities", {}) if c != task.first_city]
  known: dict[tuple[str, int], Any] = {}

  def day(city, number):
    if (city, number) not in known:
      known[city, number] = _plan_day(task, city, number, rules, call, rng)
    return known[city, number]

  for _ in range(_CITY_PAIRS):
    route = [task.first_city, *rng.sample(cities, 2)]
    near = all(
      _ask(
        call,
        "get_inter_city_transport",
        {"from_city": city, "to_city": other},
      )["train_hours"]
      <= task.hours
      for city, other in itertools.pairwise(route)
    )
    days = [day(c, n) for n, c in enumerate(route, 1)] if near else [None]
    if None in days:
      continue
    if sum(cost for cost, _ in days) <= task.total:
      return [plan for _, plan in days]
  return None


def _plan_day(task, city, number, rules, call, rng):
  """Returns the cheapest of many random days in a city, or None."""
  date = task.days[number - 1]
  weather = {"city": city, "date": date}
  sky = _ask(call, "get_weather_by_city_date", weather)["sky"]
  if task.dry and sky == "rain":
    return None
  lists = []
  for table, plural, wanted in (
    ("hotel", "hotels", ["price"]),
    ("restaurant", "restaurants", ["price", "stars"]),
    ("attraction", "attractions", ["ticket"]),
  ):
    names = _ask(call, f"get_all_{plural}_by_city", {"city": city})
    arguments = {"info_keywords": wanted}
    lists.append(
      [
        (n, _ask(call, f"get_infos_by_{table}", arguments | {table: n}))
        for n in names
      ]
    )
  best = None
  for _ in range(_CHOICES // 5):
    hotel, visit = rng.choice(lists[0]), rng.choice(lists[2])
    lunch, dinner = rng.sample(lists[1], 2)
    price, ticket = hotel[1]["price"], visit[1]["ticket"]
    meals = lunch[1]["price"] + dinner[1]["price"]
    stars = sorted((lunch[1]["stars"], dinner[1]["stars"]))
    if number in rules and not _keeps(
      rules[number], price, meals, stars, ticket
    ):
      continue
    if best is None or price + meals + ticket < best[0]:
      names = (date, city, hotel[0], lunch[0], visit[0], dinner[0])
      best = (price + meals + ticket, dict(zip(_TRIP_KEYS, names)))
  return best


_TRIP_KEYS = (
  "time",
  "city",
  "hotel",
  "afternoon_restaurant",
  "afternoon_attraction",
  "evening_restaurant",
)


def _keeps(rule, price, meals, stars, ticket):
  most, both, dear_ticket, one, middle_ticket, low = rule
  if price >= 800:
    return meals < most and stars[0] >= both and ticket < dear_ticket
  if price >= 500:
    return stars[1] >= one and ticket < middle_ticket
  return stars[1] >= low


def _bundle(task, found, measure, rng):
  """Samples choices, cheap ones more often, until one keeps the rules."""
  details = task.details
  size, budget = int(details["size"]), float(details["budget"])
  limit, required = float(details["limit"]), float(details["required"])
  standard = reading.column(details["standard"])
  if len(found) < size:
    return None
  found.sort(key=lambda row: row[measure])
  for _ in range(_CHOICES):
    reach = rng.randint(size, len(found))
    rows = rng.sample(found[:reach], size)
    total = sum(row[measure] for row in rows)
    if total > budget or len({row["parent"] for row in rows}) < size:
      continue
    dear = any(row[measure] > limit for row in rows)
    if not dear or all(row[standard] >= required for row in rows):
      names = [row["name"] for row in rows]
      return dict(zip(task.answer_keys, (names, total)))
  return None


def _holds(wish, infos):
  symbol = conditions.SYMBOLS[wish.op]
  return _HOLDS[symbol](infos[wish.column], wish.value)


def _ask(call, name, arguments):
  step = call(name, arguments)
  if step.done or step.observation.startswith("error"):
    raise _Lost(name)
  return json.loads(step.observation)
