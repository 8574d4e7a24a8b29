"""The domains of trade and work."""

from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import words

number, choice = schema.number, schema.choice
flag, date = schema.flag, schema.date

CARS = schema.domain(
  "used_cars",
  "I want to buy a used car from one of the dealers nearby.",
  schema.table(
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
  schema.table(
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
  schema.table(
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

JOBS = schema.domain(
  "job_search",
  "I am looking for a new position and have a few wishes.",
  schema.table(
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
  schema.table(
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
  schema.table(
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

GROCERIES = schema.domain(
  "grocery_shopping",
  "I plan this week's shopping and compare the shops in town.",
  schema.table(
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
  schema.table(
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

WAREHOUSES = schema.domain(
  "warehouse_stock",
  "Our purchasing team asks about the stock in the warehouses.",
  schema.table(
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
  schema.table(
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
  schema.table(
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

DOMAINS = (CARS, JOBS, GROCERIES, WAREHOUSES)
