"""Trip planning, and the domains of places, health, learning and homes."""

from dsv32_jax.agents.synthesis.general import china
from dsv32_jax.agents.synthesis.general import domains_leisure
from dsv32_jax.agents.synthesis.general import domains_trade
from dsv32_jax.agents.synthesis.general import schema
from dsv32_jax.agents.synthesis.general import words

Table, Grid, Domain = schema.Table, schema.Grid, schema.Domain
number, choice = schema.number, schema.choice
flag, date = schema.flag, schema.date

TRIP = Domain(
  name="trip_planning",
  setting="I am planning a trip around the first days of October 2025.",
  fixed=True,
  tables=(
    Table(
      name="city",
      plural="cities",
      rows=(8, 10),
      pattern="{0}",
      words=(tuple(china.CITIES),),
      columns=(
        number("population", 3.0, 33.0, 0.1, "million"),
        choice("region", *china.REGIONS),
        choice("climate", *china.CLIMATES),
      ),
      known=china.CITIES,
    ),
    Table(
      name="hotel",
      plural="hotels",
      rows=(4, 6),
      pattern="{parent} {0} {1} Hotel",
      words=(words.QUALITIES, words.NATURE),
      parent="city",
      columns=(
        number("price", 200, 1200, 10, "CNY a night", grade=0.7),
        number("stars", 3.0, 5.0, 0.1, grade=0.7),
        number("distance_to_station", 1, 25, 1, "km"),
        flag("breakfast"),
      ),
    ),
    Table(
      name="restaurant",
      plural="restaurants",
      rows=(5, 7),
      pattern="{parent} {0} {1} {2}",
      words=(
        words.QUALITIES,
        words.NATURE,
        ("Kitchen", "Noodles", "Teahouse", "Dining Hall"),
      ),
      parent="city",
      columns=(
        number("price", 30, 260, 5, "CNY a person", grade=0.6),
        number("stars", 2.8, 5.0, 0.1, grade=0.6),
        choice("style", "local", "noodles", "seafood", "vegetarian", "hotpot"),
      ),
    ),
    Table(
      name="attraction",
      plural="attractions",
      rows=(4, 6),
      pattern="{parent} {0} {1} {2}",
      words=(
        words.QUALITIES,
        words.NATURE,
        ("Temple", "Park", "Museum", "Pagoda", "Old Street"),
      ),
      parent="city",
      columns=(
        number("ticket", 0, 240, 10, "CNY", grade=0.4),
        number("stars", 3.0, 5.0, 0.1, grade=0.4),
        number("visit", 1, 5, 1, "hours"),
        choice("type", "nature", "history", "art", "family"),
      ),
    ),
  ),
  grids=(
    Grid(
      name="city_transport",
      axes=(("city", "city"),),
      columns=(
        number("metro_lines", 0, 18),
        number("metro_fare", 2, 9, 1, "CNY"),
        number("taxi_start_fare", 8, 16, 1, "CNY"),
      ),
      tool="get_city_transport",
      description="Tells how one moves within a city and what it costs.",
    ),
    Grid(
      name="inter_city_transport",
      axes=(("from_city", "city"), ("to_city", "city")),
      columns=(
        number("train_hours", 0.5, 14, 0.5, "hours"),
        number("train_price", 20, 1200, 10, "CNY"),
        number("trains_a_day", 2, 60),
      ),
      tool="get_inter_city_transport",
      description="Tells about trains from one city to another.",
      derive=china.train,
    ),
    Grid(
      name="weather",
      axes=(("city", "city"), ("date", "date")),
      columns=(
        choice("sky", "sunny", "cloudy", "rain"),
        number("high", 16, 31, 1, "degrees Celsius"),
      ),
      tool="get_weather_by_city_date",
      description="Tells the weather of a city on a date.",
    ),
  ),
)


CLINICS = schema.domain(
  "clinic_appointments",
  "I want to see a doctor and compare what the clinics around here offer.",
  Table(
    name="clinic",
    plural="clinics",
    rows=(5, 8),
    pattern="{0} {1}",
    words=(words.DISTRICTS, ("Clinic", "Medical Centre", "Polyclinic")),
    columns=(
      number("rating", 3.0, 5.0, 0.1),
      number("beds", 10, 240, 5, optional=True),
      choice("insurance", "public", "private", "both"),
      flag("parking"),
    ),
  ),
  Table(
    name="doctor",
    plural="doctors",
    rows=(4, 7),
    pattern="Dr. {0} {1}",
    words=(words.GIVEN, words.FAMILY),
    parent="clinic",
    columns=(
      choice(
        "specialty", "general", "dermatology", "cardiology", "orthopaedics"
      ),
      number("experience", 2, 38, 1, "years", grade=0.5),
      number("fee", 40, 260, 5, "euros", grade=0.6),
      number("waiting_time", 1, 40, 1, "days", grade=0.3, optional=True),
      choice("language", "English", "German", "Spanish", optional=True),
      flag("video_visits"),
    ),
  ),
  Table(
    name="treatment",
    plural="treatments",
    rows=(1, 3),
    pattern="{0} {1} {2}",
    words=(
      ("Short", "Standard", "Extended", "Intensive"),
      ("Laser", "Ultrasound", "Physio", "Check-up", "Imaging", "Infusion"),
      words.NUMERALS,
    ),
    parent="doctor",
    columns=(
      number("duration", 10, 90, 5, "minutes"),
      number("cost", 20, 400, 10, "euros", grade=0.4),
      date("next_slot", 0, 45),
    ),
  ),
)

APARTMENTS = schema.domain(
  "apartment_rental",
  "We are looking for a flat to rent in town.",
  Table(
    name="district",
    plural="districts",
    rows=(5, 8),
    pattern="{0}",
    words=(words.DISTRICTS,),
    columns=(
      number("safety", 3.0, 9.9, 0.1),
      number("schools", 1, 14),
      number("travel_to_centre", 5, 50, 1, "minutes", optional=True),
      flag("night_bus"),
    ),
  ),
  Table(
    name="apartment",
    plural="apartments",
    rows=(5, 8),
    pattern="{0} Street {1}",
    words=(words.NATURE, words.NUMERALS),
    parent="district",
    columns=(
      number("rent", 480, 2400, 20, "euros a month", grade=0.7),
      number("area", 24, 130, 1, "square metres", grade=0.6),
      number("floor", 0, 9, optional=True),
      choice("heating", "gas", "district", "heat pump", "oil"),
      date("free_from", 0, 120, optional=True),
      flag("balcony"),
      flag("pets_allowed"),
    ),
  ),
  Table(
    name="viewing",
    plural="viewings",
    rows=(1, 3),
    pattern="Viewing {0}-{1}",
    words=(words.NUMERALS, words.NUMERALS),
    parent="apartment",
    columns=(
      date("day", 0, 20),
      number("guests", 1, 12),
      choice("agent", *words.FAMILY[:6]),
    ),
  ),
)

COURSES = schema.domain(
  "university_courses",
  "I am putting together my courses for the coming term.",
  Table(
    name="department",
    plural="departments",
    rows=(5, 8),
    pattern="Department of {0}",
    words=(words.SUBJECTS,),
    columns=(
      number("professors", 4, 40),
      choice("campus", "North", "South", "City"),
      number("founded", 1850, 2010, 1, optional=True),
    ),
  ),
  Table(
    name="course",
    plural="courses",
    rows=(4, 7),
    pattern="{0} {1} {2}",
    words=(
      ("Introduction to", "Advanced", "Topics in", "Seminar on"),
      words.SUBJECTS,
      words.NUMERALS,
    ),
    parent="department",
    columns=(
      number("credits", 2, 12),
      number("workload", 3, 20, 1, "hours a week", grade=0.4),
      number("rating", 2.0, 5.0, 0.1, grade=0.3),
      number("places", 10, 200, 5, optional=True),
      choice("exam", "written", "oral", "project", "essay"),
      flag("recorded"),
    ),
  ),
  Table(
    name="session",
    plural="sessions",
    rows=(1, 3),
    pattern="Session {0}/{1}",
    words=(words.NUMERALS, words.NUMERALS),
    parent="course",
    columns=(
      choice("weekday", "Monday", "Tuesday", "Wednesday", "Thursday"),
      number("start_hour", 8, 18),
      number("length", 45, 180, 15, "minutes"),
    ),
  ),
)

MUSEUMS = schema.domain(
  "museum_visits",
  "A museum weekend is coming up and I want to choose what to see.",
  Table(
    name="museum",
    plural="museums",
    rows=(5, 8),
    pattern="{0} Museum of {1}",
    words=(
      words.CITIES,
      ("Art", "Science", "History", "Design", "Shipping", "Nature"),
    ),
    columns=(
      number("entry", 0, 30, 1, "euros"),
      number("opening_hour", 8, 12),
      number("founded", 1790, 2019),
      flag("cafe"),
    ),
  ),
  Table(
    name="exhibition",
    plural="exhibitions",
    rows=(4, 7),
    pattern="{0} {1} {2}",
    words=(
      words.QUALITIES,
      words.NATURE,
      ("Visions", "Stories", "Collection", "Archive", "Dreams"),
    ),
    parent="museum",
    columns=(
      number("objects", 12, 400, 2),
      number("surcharge", 0, 20, 1, "euros", grade=0.5),
      number("visitors_a_day", 30, 1500, 10, grade=0.5, optional=True),
      choice("theme", "portrait", "landscape", "machines", "fashion"),
      date("closing_day", 5, 150),
      flag("audio_guide"),
    ),
  ),
  Table(
    name="tour",
    plural="tours",
    rows=(1, 3),
    pattern="Tour {0} with {1} {2}",
    words=(words.NUMERALS, words.GIVEN, words.FAMILY),
    parent="exhibition",
    columns=(
      number("price", 0, 25, 1, "euros"),
      number("group_size", 4, 30),
      choice("language", "English", "French", "German", "Italian"),
    ),
  ),
)

DOMAINS = (
  TRIP,
  CLINICS,
  APARTMENTS,
  COURSES,
  MUSEUMS,
  *domains_trade.DOMAINS,
  *domains_leisure.DOMAINS,
)
