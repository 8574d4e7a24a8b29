"""The domains of travel, sport and culture."""

from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import words

number, choice = schema.number, schema.choice
flag, date = schema.flag, schema.date

LIBRARIES = schema.domain(
  "library_loans",
  "I need reading for the winter from the libraries of our region.",
  schema.table(
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
  schema.table(
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
  schema.table(
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

FLIGHTS = schema.domain(
  "flight_booking",
  "I want to fly next month and do not mind which airport I leave from.",
  schema.table(
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
  schema.table(
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

FESTIVALS = schema.domain(
  "music_festival",
  "We are going to the festival and cannot see everything.",
  schema.table(
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
  schema.table(
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

LEAGUE = schema.domain(
  "sports_league",
  "I write about the league and check facts on teams and players.",
  schema.table(
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
  schema.table(
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

DOMAINS = (LIBRARIES, FLIGHTS, FESTIVALS, LEAGUE)
