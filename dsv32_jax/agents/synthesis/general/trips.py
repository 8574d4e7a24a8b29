"""The trip-planning task: three days, three cities, a budget that depends.

Nothing repeats, and every hotel, restaurant and attraction lies in its day's
city. On a day with a rule, the dearer the hotel, the less the meals may cost
together, the better the restaurants and the cheaper the attraction must be.
Harder tasks have rules on more days, a first city that is given, a bound on
hours by train, and no rain on a day of sights.
"""

from collections.abc import Mapping
import dataclasses
import random
from typing import Any

from dsv32_jax.agents.synthesis.general import conditions as conditions_lib
from dsv32_jax.agents.synthesis.general import tasks
from dsv32_jax.agents.synthesis.general import trip_programs
from dsv32_jax.agents.synthesis.general import wrong

KEYS = (
  "time",
  "city",
  "hotel",
  "afternoon_restaurant",
  "afternoon_attraction",
  "evening_restaurant",
)
NUM_DAYS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DayRule:
  """A conditional budget; prices in CNY.

  Attributes:
    day: 1 to 3.
    meals: at a hotel of 800 or more, lunch and dinner cost less than this.
    stars: then both restaurants have at least these.
    ticket: then the attraction costs less than this.
    middle_stars: at 500 to 800, one restaurant has at least these.
    middle_ticket: then the attraction costs less than this.
    low_stars: below 500, one restaurant has at least these.
  """

  day: int
  meals: int
  stars: float
  ticket: int
  middle_stars: float
  middle_ticket: int
  low_stars: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trip:
  """A trip task.

  Attributes:
    first_city: where it begins.
    days: ISO dates.
    rules: at most one a day.
    max_train_hours: from each city to the next; None: any.
    dry: no rain at the day's city.
    max_total: all hotels, meals and tickets together; None: any.
  """

  first_city: str
  days: tuple[str, ...]
  rules: tuple[DayRule, ...]
  max_train_hours: float | None
  dry: bool
  max_total: int | None


def draw(data: conditions_lib.Data, level: int, rng: random.Random) -> Trip:
  """Draws a trip; level 1 has one rule, level 4 has them all.

  Raises:
    tasks.Rejection: if it rains in the first city on the first day.
  """
  weather = data.rows["weather"]
  days = sorted({row["date"] for row in weather})
  numbers = {1: [2], 2: [2], 3: [1, 2]}.get(level, [1, 2, 3])
  dry = level >= 3
  first = rng.choice(
    [
      row["city"]
      for row in weather
      if row["date"] == days[0] and not (dry and row["sky"] == "rain")
    ]
    or [None]
  )
  if first is None:
    raise tasks.Rejection("it rains everywhere on the first day")
  rules = tuple(
    DayRule(
      day=day,
      meals=rng.randrange(220, 380, 10),
      stars=rng.choice((3.8, 4.0, 4.2)),
      ticket=rng.randrange(80, 150, 10),
      middle_stars=rng.choice((3.8, 4.0, 4.2)),
      middle_ticket=rng.randrange(100, 200, 10),
      low_stars=rng.choice((3.2, 3.6, 4.0)),
    )
    for day in numbers
  )
  return Trip(
    first_city=first,
    days=tuple(days),
    rules=rules,
    max_train_hours=rng.choice((3.0, 3.5, 4.0)) if level >= 2 else None,
    dry=dry,
    max_total=rng.randrange(1500, 2600, 50) if level >= 2 else None,
  )


def make(data: conditions_lib.Data, trip: Trip, toolset, rng: random.Random):
  """Writes the task of a trip; the domain has every tool it needs."""
  del toolset
  text = {"type": "string"}
  return tasks.Draft(
    kind="trip",
    statement=_statement(data.domain.setting, trip),
    answer_schema={
      "type": "array",
      "items": tasks.object_schema(dict.fromkeys(KEYS, text)),
    },
    solution=trip_programs.solution(trip),
    verifier=trip_programs.verifier(trip),
    wrong_answers=_wrong_answers(data, trip, rng),
  )


def _statement(setting, trip):
  lines = [
    f"{setting} It takes three days, from {trip.days[0]} to {trip.days[-1]},"
    f" and begins in {trip.first_city}; each day is spent in another city. No"
    " city, hotel, attraction or restaurant may come twice on the whole trip."
    " Each day's hotel, two restaurants and attraction must lie in that day's"
    " city."
  ]
  for rule in trip.rules:
    lines.append(
      f"On day {rule.day}, if the hotel costs 800 CNY or more, lunch and"
      f" dinner together must cost less than {rule.meals} CNY, both"
      f" restaurants must have at least {rule.stars} stars, and the ticket must"
      f" cost less than {rule.ticket} CNY. If it costs from 500 to below 800"
      f" CNY, at least one restaurant must have {rule.middle_stars} stars or"
      f" more, and the ticket must cost less than {rule.middle_ticket} CNY. If"
      " it costs below 500 CNY, at least one restaurant must have"
      f" {rule.low_stars} stars or more."
    )
  if trip.max_train_hours is not None:
    lines.append(
      "From each city to the next the train may take"
      f" {trip.max_train_hours} hours at most."
    )
  if trip.dry:
    lines.append("It must not rain in a city on the day I am there.")
  if trip.max_total is not None:
    lines.append(
      "All hotels, meals and tickets together must cost at most"
      f" {trip.max_total} CNY."
    )
  lines.append(
    "Submit a list of one object a day with the date as time, and the city,"
    " hotel, afternoon_restaurant, afternoon_attraction and evening_restaurant."
  )
  return " ".join(lines)


def _wrong_answers(data, trip, rng) -> list[list[Mapping[str, Any]]]:
  """Plans that break a rule by how they are made, whatever they cost."""
  cities = [row["name"] for row in data.rows["city"]]
  others = rng.sample([c for c in cities if c != trip.first_city], 2)
  plan = [
    _day(data, date, city, rng)
    for date, city in zip(trip.days, [trip.first_city, *others])
  ]
  elsewhere = lambda table: rng.choice(data.below({"name": others[1]}, table))
  changed = lambda day, **fields: [
    {**row, **fields} if place == day else row for place, row in enumerate(plan)
  ]
  return wrong.different(
    [
      [*plan[:1], {**plan[0], "time": trip.days[1]}, *plan[2:]],
      changed(0, hotel=elsewhere("hotel")["name"]),
      changed(1, afternoon_attraction=elsewhere("attraction")["name"]),
      changed(1, evening_restaurant=plan[1]["afternoon_restaurant"]),
      changed(0, time=trip.days[1]),
      changed(2, hotel=f"{others[1]} Hotel that is not there"),
      plan[:2],
      [plan[1], plan[0], plan[2]],
    ],
    None,
  )


def _day(data, date, city, rng):
  below = lambda table, count: [
    row["name"] for row in rng.sample(data.below({"name": city}, table), count)
  ]
  lunch, dinner = below("restaurant", 2)
  return dict(
    zip(
      KEYS,
      (
        date,
        city,
        below("hotel", 1)[0],
        lunch,
        below("attraction", 1)[0],
        dinner,
      ),
    )
  )
