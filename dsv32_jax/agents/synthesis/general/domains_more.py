"""The domains of trade, work, travel, sport and culture."""

from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import words

Table = schema.Table
number, choice = schema.number, schema.choice
flag, date = schema.flag, schema.date


def _table(name, plural, rows, pattern, word_lists, columns, parent=None):
  return Table(
    name=name,
    plural=plural,
    rows=rows,
    pattern=pattern,
    words=word_lists,
    columns=columns,
    parent=parent,
  )


def _domain(name, setting, *tables, first_day="2025-10-01"):
  return schema.Domain(
    name=name, setting=setting, tables=tables, first_day=first_day
  )


CARS = _domain(
  "used_cars",
  "I want to buy a used car from one of the dealers nearby.",
  _table(
    "dealer",
    "dealers",
    (5, 8),
    "{0} {1}",
    (words.FAMILY, ("Motors", "Auto House", "Car Centre")),
    (
      number("rating", 2.5, 5.0, 0.1),
      number("distance", 1, 90, 1, "km"),
      number("warranty", 0, 36, 3, "months", optional=True),
      flag("trade_in"),
    ),
  ),
  _table(
    "car",
    "cars",
    (5, 8),
    "{0} {1} {2}",
    (words.BRANDS, ("Sedan", "Estate", "Coupe", "Van"), words.NUMERALS),
    (
      number("price", 2500, 42000, 250, "euros", grade=0.8),
      number("mileage", 5, 240, 1, "thousand km", grade=-0.7),
      number("year", 2008, 2024, 1, grade=0.7),
      choice("fuel", "petrol", "diesel", "hybrid", "electric"),
      choice("colour", "grey", "white", "blue", "red", optional=True),
      number("previous_owners", 1, 5, optional=True),
      flag("winter_tyres"),
    ),
    "dealer",
  ),
  _table(
    "inspection",
    "inspections",
    (1, 3),
    "Inspection {0}-{1}",
    (words.NUMERALS, words.NUMERALS),
    (
      number("defects", 0, 9),
      number("repair_cost", 0, 1800, 50, "euros"),
      choice("inspector", *words.FAMILY[6:11]),
    ),
    "car",
  ),
)

JOBS = _domain(
  "job_search",
  "I am looking for a new position and have a few wishes.",
  _table(
    "company",
    "companies",
    (5, 8),
    "{0} {1}",
    (words.BRANDS, ("Systems", "Works", "Logistics", "Labs", "Energy")),
    (
      number("employees", 12, 4800, 4),
      number("satisfaction", 2.0, 5.0, 0.1),
      choice("sector", "software", "transport", "energy", "health"),
      number("founded", 1950, 2021, 1, optional=True),
    ),
  ),
  _table(
    "opening",
    "openings",
    (4, 7),
    "{0} {1} {2}",
    (
      ("Junior", "Senior", "Lead", "Associate"),
      ("Engineer", "Analyst", "Planner", "Designer", "Technician"),
      words.NUMERALS,
    ),
    (
      number("salary", 32, 118, 1, "thousand euros a year", grade=0.7),
      number("experience", 0, 12, 1, "years", grade=0.6),
      number("holidays", 24, 36, 1, "days", optional=True),
      choice("contract", "permanent", "fixed-term", "part-time"),
      number("home_office", 0, 5, 1, "days a week"),
      date("deadline", 3, 75),
      flag("relocation_help"),
    ),
    "company",
  ),
  _table(
    "interview",
    "interviews",
    (1, 3),
    "Interview {0}-{1}",
    (words.NUMERALS, words.NUMERALS),
    (
      date("day", 5, 40),
      number("length", 30, 180, 15, "minutes"),
      choice("format", "video", "on site", "phone"),
    ),
    "opening",
  ),
)

GROCERIES = _domain(
  "grocery_shopping",
  "I plan this week's shopping and compare the shops in town.",
  _table(
    "shop",
    "shops",
    (5, 8),
    "{0} {1}",
    (words.DISTRICTS, ("Market", "Grocer", "Foods", "Co-op")),
    (
      number("distance", 1, 30, 1, "km"),
      number("rating", 2.5, 5.0, 0.1),
      number("closing_hour", 17, 23),
      flag("delivery"),
    ),
  ),
  _table(
    "product",
    "products",
    (6, 10),
    "{0} {1} {2}",
    (
      words.BRANDS,
      ("Oats", "Yoghurt", "Lentils", "Bread", "Cheese", "Olives", "Pasta"),
      words.NUMERALS,
    ),
    (
      number("price", 60, 990, 5, "cents", grade=0.5),
      number("weight", 100, 2000, 50, "grams"),
      number("protein", 1, 32, 1, "grams", grade=0.4),
      number("sugar", 0, 40, 1, "grams", optional=True),
      choice("origin", "Spain", "Italy", "Poland", "Greece"),
      date("best_before", 4, 240),
      flag("organic"),
    ),
    "shop",
  ),
)

LIBRARIES = _domain(
  "library_loans",
  "I need reading for the winter from the libraries of our region.",
  _table(
    "branch",
    "branches",
    (5, 8),
    "{0} Library",
    (words.CITIES,),
    (
      number("seats", 10, 220, 5),
      number("closing_hour", 16, 22),
      number("distance", 1, 45, 1, "km", optional=True),
      flag("study_rooms"),
    ),
  ),
  _table(
    "book",
    "books",
    (5, 8),
    "The {0} {1} of {2}",
    (words.QUALITIES, words.NATURE, words.CITIES),
    (
      number("pages", 90, 900, 2),
      number("published", 1935, 2025),
      number("rating", 2.5, 5.0, 0.1, optional=True),
      choice("genre", "novel", "history", "poetry", "science", "travel"),
      choice("language", "English", "French", "Spanish", optional=True),
      number("waiting_list", 0, 14, 1, "readers"),
      flag("large_print"),
    ),
    "branch",
  ),
  _table(
    "copy",
    "copies",
    (1, 4),
    "Copy {0}-{1}",
    (words.NUMERALS, words.NUMERALS),
    (
      choice("condition", "good", "worn", "new"),
      date("due_back", 0, 40),
      number("loans", 0, 120),
    ),
    "book",
  ),
)

FLIGHTS = _domain(
  "flight_booking",
  "I want to fly next month and do not mind which airport I leave from.",
  _table(
    "airport",
    "airports",
    (5, 8),
    "{0} Airport",
    (words.CITIES,),
    (
      number("security_wait", 5, 60, 1, "minutes"),
      number("transfer_cost", 3, 45, 1, "euros"),
      number("terminals", 1, 5),
      flag("lounge"),
    ),
  ),
  _table(
    "flight",
    "flights",
    (5, 9),
    "{0} {1}",
    (words.BRANDS, words.NUMERALS),
    (
      choice("destination", "Athens", "Oslo", "Dublin", "Rome", "Vienna"),
      date("departure_day", 0, 30),
      number("departure_hour", 5, 22),
      number("fare", 39, 620, 1, "euros", grade=0.6),
      number("duration", 60, 420, 5, "minutes", grade=-0.4),
      number("baggage", 0, 32, 1, "kg", grade=0.5, optional=True),
      flag("refundable"),
    ),
    "airport",
  ),
)

FESTIVALS = _domain(
  "music_festival",
  "We are going to the festival and cannot see everything.",
  _table(
    "stage",
    "stages",
    (5, 7),
    "{0} Stage",
    (words.NATURE,),
    (
      number("capacity", 200, 12000, 100),
      number("walk_from_gate", 2, 30, 1, "minutes"),
      choice("surface", "grass", "gravel", "tent"),
    ),
  ),
  _table(
    "concert",
    "concerts",
    (5, 8),
    "The {0} {1}s",
    (words.QUALITIES, words.NATURE),
    (
      number("start_hour", 12, 23),
      number("length", 30, 150, 5, "minutes", grade=0.4),
      number("members", 1, 12),
      number("listeners", 5, 900, 1, "thousand", grade=0.7),
      choice("genre", "folk", "jazz", "rock", "electronic", "soul"),
      date("day", 0, 3),
      flag("signing_session"),
    ),
    "stage",
  ),
  first_day="2026-07-09",
)

WAREHOUSES = _domain(
  "warehouse_stock",
  "Our purchasing team asks about the stock in the warehouses.",
  _table(
    "warehouse",
    "warehouses",
    (5, 7),
    "{0} Depot",
    (words.CITIES,),
    (
      number("docks", 2, 24),
      number("area", 800, 16000, 200, "square metres"),
      choice("zone", "north", "south", "port"),
      flag("cold_storage"),
    ),
  ),
  _table(
    "item",
    "items",
    (5, 8),
    "{0} {1} {2}",
    (words.BRANDS, ("Pump", "Valve", "Motor", "Sensor"), words.NUMERALS),
    (
      number("stock", 0, 480),
      number("unit_cost", 4, 390, 1, "euros", grade=0.6),
      number("weight", 1, 90, 1, "kg", grade=0.4),
      number("reorder_level", 5, 120, 5, optional=True),
      choice("supplier", *words.FAMILY[11:16]),
      flag("fragile"),
    ),
    "warehouse",
  ),
  _table(
    "delivery",
    "deliveries",
    (1, 4),
    "Delivery {0}-{1}",
    (words.NUMERALS, words.NUMERALS),
    (
      date("arrival", 0, 60),
      number("quantity", 5, 200, 5),
      choice("carrier", "rail", "road", "sea"),
    ),
    "item",
  ),
)

LEAGUE = _domain(
  "sports_league",
  "I write about the league and check facts on teams and players.",
  _table(
    "team",
    "teams",
    (6, 8),
    "{0} {1}",
    (words.CITIES, ("United", "Rovers", "Athletic", "Wanderers")),
    (
      number("points", 8, 74),
      number("stadium_seats", 3000, 62000, 500),
      number("founded", 1880, 1995),
      choice("kit", "red", "blue", "green", "white", optional=True),
    ),
  ),
  _table(
    "player",
    "players",
    (5, 8),
    "{0} {1}",
    (words.GIVEN, words.FAMILY),
    (
      number("age", 17, 38),
      number("goals", 0, 28, 1, grade=0.6),
      number("matches", 2, 34, 1, grade=0.4),
      number("salary", 30, 900, 10, "thousand euros a year", grade=0.7),
      choice("position", "midfield", "defence", "attack", "goal"),
      choice("foot", "right", "left", optional=True),
      date("contract_end", 60, 1400, 10, optional=True),
    ),
    "team",
  ),
)

DOMAINS = (
  CARS,
  JOBS,
  GROCERIES,
  LIBRARIES,
  FLIGHTS,
  FESTIVALS,
  WAREHOUSES,
  LEAGUE,
)
