"""Solution and verifier of a trip, written out from its rules."""

# The bounds between the three kinds of hotel, CNY a night.
DEAR, MIDDLE = 800, 500

_FITS = """  def fits(day, hotel, lunch, dinner, ticket):
    if day not in rules:
      return True
    rule = rules[day]
    stars = sorted([lunch["stars"], dinner["stars"]])
    if hotel >= {dear}:
      meals = lunch["price"] + dinner["price"]
      return (
        meals < rule["meals"]
        and stars[0] >= rule["stars"]
        and ticket < rule["ticket"]
      )
    if hotel >= {middle}:
      return stars[1] >= rule["middle_stars"] and ticket < rule["middle_ticket"]
    return stars[1] >= rule["low_stars"]
"""

# The cheapest day of each city by itself; then the pairs of cities that follow.
_SOLUTION = """def solve():
  days, rules = {days!r}, {rules!r}
  dry, hours_bound, total_bound = {dry}, {hours}, {most}
{fits}
  def cheapest(city, day):
    if dry and get_weather_by_city_date(
      city=city, date=days[day - 1]
    )["sky"] == "rain":
      return None
    if city not in seen:
      tables = {{"hotel": [], "restaurant": [], "attraction": []}}
      for name in get_all_hotels_by_city(city=city):
        infos = get_infos_by_hotel(info_keywords=["price"], hotel=name)
        tables["hotel"].append([infos["price"], name])
      for name in get_all_restaurants_by_city(city=city):
        infos = get_infos_by_restaurant(
          info_keywords=["price", "stars"], restaurant=name
        )
        tables["restaurant"].append([name, infos])
      for name in get_all_attractions_by_city(city=city):
        infos = get_infos_by_attraction(
          info_keywords=["ticket"], attraction=name
        )
        tables["attraction"].append([infos["ticket"], name])
      seen[city] = tables
    tables, best = seen[city], None
    meals = [
      [lunch[1]["price"] + dinner[1]["price"], lunch, dinner]
      for place, lunch in enumerate(tables["restaurant"])
      for dinner in tables["restaurant"][place + 1 :]
    ]
    for price, hotel in tables["hotel"]:
      for ticket, attraction in tables["attraction"]:
        for cost, lunch, dinner in meals:
          total = price + ticket + cost
          if best is not None and best[0] <= total:
            continue
          if fits(day, price, lunch[1], dinner[1], ticket):
            plan = {{
              "time": days[day - 1],
              "city": city,
              "hotel": hotel,
              "afternoon_restaurant": lunch[0],
              "afternoon_attraction": attraction,
              "evening_restaurant": dinner[0],
            }}
            best = [total, plan]
    return best

  def near(city, other):
    if hours_bound is None:
      return True
    if (city, other) not in trains:
      trains[(city, other)] = get_inter_city_transport(
        from_city=city, to_city=other
      )["train_hours"]
    return trains[(city, other)] <= hours_bound

  seen, trains = {{}}, {{}}
  first = {first!r}
  start = cheapest(first, 1)
  if start is None:
    return None
  cities = [city for city in get_all_cities() if city != first]
  second = {{city: cheapest(city, 2) for city in cities if near(first, city)}}
  third = {{city: cheapest(city, 3) for city in cities}}
  for city in second:
    for other in cities:
      if city == other or second[city] is None or third[other] is None:
        continue
      total = start[0] + second[city][0] + third[other][0]
      if total_bound is not None and total > total_bound:
        continue
      if near(city, other):
        return [start[1], second[city][1], third[other][1]]
  return None
"""

_VERIFIER = """def verify(answer):
  days, rules = {days!r}, {rules!r}
  dry, hours_bound, total_bound = {dry}, {hours}, {most}
{fits}
  if [day["time"] for day in answer] != days:
    return False
  cities = [day["city"] for day in answer]
  if cities[0] != {first!r} or len(set(cities)) != len(days):
    return False
  total = 0
  for number, day in enumerate(answer, 1):
    city = day["city"]
    hotel = query(
      "SELECT price FROM hotel WHERE name = ? AND city = ?", day["hotel"], city
    )
    ticket = query(
      "SELECT ticket FROM attraction WHERE name = ? AND city = ?",
      day["afternoon_attraction"],
      city,
    )
    meals = [
      dict(price=row[0], stars=row[1])
      for key in ["afternoon_restaurant", "evening_restaurant"]
      for row in query(
        "SELECT price, stars FROM restaurant WHERE name = ? AND city = ?",
        day[key],
        city,
      )
    ]
    if len(hotel) != 1 or len(ticket) != 1 or len(meals) != 2:
      return False
    if day["afternoon_restaurant"] == day["evening_restaurant"]:
      return False
    if not fits(number, hotel[0][0], meals[0], meals[1], ticket[0][0]):
      return False
    sky = query(
      "SELECT sky FROM weather WHERE city = ? AND date = ?", city, day["time"]
    )
    if dry and sky[0][0] == "rain":
      return False
    total += hotel[0][0] + ticket[0][0] + meals[0]["price"] + meals[1]["price"]
  if total_bound is not None and total > total_bound:
    return False
  for city, other in zip(cities, cities[1:]):
    hours = query(
      "SELECT train_hours FROM inter_city_transport"
      " WHERE from_city = ? AND to_city = ?",
      city,
      other,
    )
    if hours_bound is not None and hours[0][0] > hours_bound:
      return False
  return True
"""


def solution(trip) -> str:
  """Returns the source of `def solve()`."""
  return _SOLUTION.format(**_values(trip))


def verifier(trip) -> str:
  """Returns the source of `def verify(answer)`."""
  return _VERIFIER.format(**_values(trip))


def _values(trip):
  return {
    "days": list(trip.days),
    "rules": {
      rule.day: {k: v for k, v in vars(rule).items() if k != "day"}
      for rule in trip.rules
    },
    "fits": _FITS.format(dear=DEAR, middle=MIDDLE),
    "first": trip.first_city,
    "dry": trip.dry,
    "hours": trip.max_train_hours,
    "most": trip.max_total,
  }
