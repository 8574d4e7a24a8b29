"""What is true of the cities of a trip: size, region, climate, distances.

Populations are municipal, of about 2020, and places are to a tenth of a
degree; train times and prices follow from the distance.
"""

from collections.abc import Mapping
import math
from typing import Any

REGIONS = ("east", "central", "south", "west", "north")
CLIMATES = ("humid", "mild", "hot")

# Population in million, region, climate, latitude, longitude.
_FACTS = {
  "Hangzhou": (12.2, "east", "humid", 30.3, 120.2),
  "Suzhou": (12.7, "east", "humid", 31.3, 120.6),
  "Shanghai": (24.9, "east", "humid", 31.2, 121.5),
  "Nanjing": (9.3, "east", "humid", 32.1, 118.8),
  "Ningbo": (9.4, "east", "humid", 29.9, 121.5),
  "Shaoxing": (5.3, "east", "humid", 30.0, 120.6),
  "Wuxi": (7.5, "east", "humid", 31.5, 120.3),
  "Changzhou": (5.3, "east", "humid", 31.8, 120.0),
  "Huzhou": (3.4, "east", "humid", 30.9, 120.1),
  "Jiaxing": (5.4, "east", "humid", 30.8, 120.8),
  "Yangzhou": (4.6, "east", "humid", 32.4, 119.4),
  "Hefei": (9.4, "central", "humid", 31.8, 117.2),
  "Wuhan": (12.3, "central", "humid", 30.6, 114.3),
  "Changsha": (10.0, "central", "hot", 28.2, 112.9),
  "Nanchang": (6.3, "central", "hot", 28.7, 115.9),
  "Xiamen": (5.2, "south", "hot", 24.5, 118.1),
  "Fuzhou": (8.3, "south", "hot", 26.1, 119.3),
  "Qingdao": (10.1, "north", "mild", 36.1, 120.4),
  "Jinan": (9.2, "north", "mild", 36.7, 117.0),
  "Chengdu": (20.9, "west", "humid", 30.7, 104.1),
  "Chongqing": (32.1, "west", "hot", 29.6, 106.6),
  "Xi'an": (13.0, "west", "mild", 34.3, 108.9),
  "Guilin": (4.9, "south", "hot", 25.3, 110.3),
  "Kunming": (8.5, "west", "mild", 25.0, 102.7),
}
CITIES = {
  name: {"population": population, "region": region, "climate": climate}
  for name, (population, region, climate, _, _) in _FACTS.items()
}


def train(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns hours and price of a train, the same in both directions."""
  from_lat, from_lon = _FACTS[row["from_city"]][3:]
  to_lat, to_lon = _FACTS[row["to_city"]][3:]
  across = math.cos(math.radians((from_lat + to_lat) / 2)) * (from_lon - to_lon)
  kilometres = 111.2 * math.hypot(from_lat - to_lat, across)
  # A fast train with its detours and stops; prices of second class.
  return {
    "train_hours": max(0.5, round(kilometres / 180 * 2) / 2),
    "train_price": max(20, round(kilometres * 0.06) * 10),
  }
