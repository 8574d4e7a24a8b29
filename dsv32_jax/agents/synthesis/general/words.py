"""Words that names are made of."""


def _words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


CITIES = _words(
  "Lisbon Porto Seville Valencia Lyon Nantes Ghent Utrecht Bremen Leipzig"
  " Graz Linz Brno Gdansk Riga Tartu Turku Bergen Aarhus Uppsala Leeds"
  " Bristol Cork Galway Bologna Turin Verona Zagreb Split Thessaloniki"
)
DISTRICTS = _words(
  "Riverside Oldtown Harbour Northgate Westfield Hillcrest Lakeside Eastbank"
  " Parkview Millfield Stonebridge Southmead Kingsway Fairmount"
)
GIVEN = _words(
  "Anna Bruno Carla Daniel Elena Felix Greta Hugo Ines Jonas Karin Lukas"
  " Marta Nils Olga Pavel Rosa Stefan Teresa Viktor Wanda Yusuf Zoe Amir"
  " Bianca Dario Emil Farid Hana Ivo Lena Mateo"
)
FAMILY = _words(
  "Almeida Bauer Castro Dietrich Eriksen Ferrari Gomez Hansen Ivanova Jansen"
  " Kowalski Lindgren Moreau Novak Olsen Petrov Quinn Rossi Schmidt Tanaka"
  " Ullman Vargas Weber Yilmaz Zhang Okafor Haddad Nakamura"
)
QUALITIES = _words(
  "Golden Silver Quiet Amber Blue Crimson Green Ivory Jade Lucky Misty Royal"
  " Scarlet Sunny Velvet White Grand Little Old New Hidden Bright Gentle"
  " Noble"
)
NATURE = _words(
  "Lotus Willow Bamboo Crane Dragon Maple Orchid Peony Phoenix Pine Plum"
  " River Cloud Moon Garden Bridge Lantern Swan Cedar Heron Meadow Fox Oak"
  " Sparrow"
)
SUBJECTS = _words(
  "Algebra Botany Optics Logic Ecology Genetics Acoustics Rhetoric Statistics"
  " Thermodynamics Topology Linguistics Robotics Cartography Hydrology"
  " Metallurgy Astronomy Ethics"
)
BRANDS = _words(
  "Aldora Brevia Corvant Delmar Estrin Fenwick Garrow Halden Istria Jorvik"
  " Kestrel Lumora Merrin Norvane Orlin Pellard"
)
NUMERALS = tuple(str(number) for number in range(101, 999, 7))
