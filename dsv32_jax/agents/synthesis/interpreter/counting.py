"""Questions about the best or the number of many choices."""

import itertools
import random

from dsv32_jax.agents.synthesis.interpreter import problems


def subsets(rng: random.Random) -> problems.Problem:
  """Subsets with a bounded sum and no two neighbours."""
  count = rng.randrange(16, 21)
  values = [rng.randrange(10, 1000) for _ in range(count)]
  low = rng.randrange(sum(values) // 8, sum(values) // 4)
  high = low + rng.randrange(200, 1500)
  # By (whether the last one is taken, the sum): how many ways.
  ways = {(False, 0): 1}
  for value in values:
    after: dict[tuple[bool, int], int] = {}
    for (taken, total), number in ways.items():
      for choice in (False, True):
        if not (choice and taken):
          key = (choice, total + value * choice)
          after[key] = after.get(key, 0) + number
    ways = after
  found = sum(n for (_, total), n in ways.items() if low <= total <= high)
  return problems.Problem(
    kind="subsets",
    statement=(
      f"Of the list {values}, choose any entries such that no two neighbours"
      f" are chosen and the sum is from {low} to {high}. How many choices are"
      " there? Answer with an integer."
    ),
    answer=str(found),
    solution=f"""
import numpy as np
values = {values}
chosen = np.arange(2 ** len(values))
chosen = chosen[chosen & (chosen >> 1) == 0]
total = sum(value * (chosen >> i & 1) for i, value in enumerate(values))
print(int(((total >= {low}) & (total <= {high})).sum()))
""",
    work=2**count // 8,
    shortcuts=(str(2**count), str(sum(n for n in ways.values()))),
  )


def queens(rng: random.Random) -> problems.Problem:
  """Queens that do not attack each other, with squares left out."""
  size = 8
  squares = [(r, c) for r in range(size) for c in range(size)]
  blocked = sorted(rng.sample(squares, rng.randrange(3, 9)))
  weights = [rng.randrange(1, 100) for _ in range(size)]

  def placed(row, columns):
    if row == size:
      yield columns
      return
    for column in range(size):
      if (row, column) not in blocked and all(
        column != other and abs(column - other) != row - r
        for r, other in enumerate(columns)
      ):
        yield from placed(row + 1, [*columns, column])

  scores = [_dot(weights, columns) for columns in placed(0, [])]
  listed = ", ".join(f"({r},{c})" for r, c in blocked)
  return problems.Problem(
    kind="queens",
    statement=(
      "On a board of 8 rows and 8 columns, numbered from 0, 8 queens stand so"
      " that none attacks another, and none on the squares (row,column)"
      f" {listed}. The score of a placement is the sum over the rows r of w(r)"
      f" times the column of the queen in row r, with w = {weights}. How many"
      " placements are there, and what is the sum of their scores? Answer with"
      " the two integers, separated by a comma."
    ),
    answer=f"{len(scores)},{sum(scores)}",
    solution=f"""
import itertools
blocked, weights = {blocked}, {weights}
count = total = 0
for columns in itertools.permutations(range(8)):
  if len({{c + r for r, c in enumerate(columns)}}) < 8:
    continue
  if len({{c - r for r, c in enumerate(columns)}}) < 8:
    continue
  if not any((r, c) in blocked for r, c in enumerate(columns)):
    count += 1
    total += sum(w * c for w, c in zip(weights, columns))
print(f"{{count}},{{total}}")
""",
    work=40_320,
    shortcuts=(f"92,{sum(weights) * 92 * 7 // 2}",),
  )


def _dot(a, b):
  return sum(x * y for x, y in zip(a, b))


def paths(rng: random.Random) -> problems.Problem:
  """Ways through a grid with walls, by what they collect."""
  width, height = rng.randrange(12, 22), rng.randrange(12, 22)
  modulus = rng.randrange(3, 9)
  rows = [
    "".join(rng.choices("0123456789#", [2] * 10 + [1], k=width))
    for _ in range(height)
  ]
  rows[0] = "1" + rows[0][1:]
  rows[-1] = rows[-1][:-1] + "1"
  asked = rng.randrange(modulus)
  # By place and by the rest of the sum: how many ways.
  ways = {(0, 0): [int(r == 1 % modulus) for r in range(modulus)]}
  for y in range(height):
    for x in range(width):
      if (y, x) == (0, 0) or rows[y][x] == "#":
        continue
      here = [0] * modulus
      for before in ((y - 1, x), (y, x - 1)):
        for rest, number in enumerate(ways.get(before, ())):
          here[(rest + int(rows[y][x])) % modulus] += number
      ways[y, x] = here
  end = ways[height - 1, width - 1]
  return problems.Problem(
    kind="paths",
    statement=(
      "The file grid.txt has a row of digits and walls (#) a line. A path goes"
      " from the upper left to the lower right cell by steps to the right or"
      " down, on digits alone. Of how many paths is the sum of the digits,"
      f" both ends included, {asked} modulo {modulus}? Answer with an integer."
    ),
    answer=str(end[asked]),
    files={"grid.txt": "\n".join(rows) + "\n"},
    solution=f"""
import functools
rows = open("grid.txt").read().split()
@functools.lru_cache(maxsize=None)
def ways(y, x, rest):
  if y == len(rows) or x == len(rows[0]) or rows[y][x] == "#":
    return 0
  rest = (rest + int(rows[y][x])) % {modulus}
  if (y, x) == (len(rows) - 1, len(rows[0]) - 1):
    return int(rest == {asked})
  return ways(y + 1, x, rest) + ways(y, x + 1, rest)
print(ways(0, 0, 0))
""",
    work=width * height * modulus,
    shortcuts=(str(sum(end)), str(sum(end) // modulus)),
  )


def tour(rng: random.Random) -> problems.Problem:
  """The shortest and the number of round trips below a length."""
  count = 8
  places = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(count)]
  apart = [[abs(a - c) + abs(b - d) for c, d in places] for a, b in places]
  # Held and Karp: by the set visited and the last place, the least length.
  best = {(1, 0): 0}
  for visited in range(1, 1 << count, 2):
    for last in range(count):
      if (visited, last) not in best:
        continue
      for to in range(count):
        if not visited >> to & 1:
          key = (visited | 1 << to, to)
          length = best[visited, last] + apart[last][to]
          best[key] = min(best.get(key, length), length)
  full = (1 << count) - 1
  shortest = min(best[full, last] + apart[last][0] for last in range(1, count))
  left, greedy, here = set(range(1, count)), 0, 0
  while left:
    to = min(left, key=apart[here].__getitem__)
    greedy, here = greedy + apart[here][to], to
    left.remove(to)
  return problems.Problem(
    kind="tour",
    statement=(
      f"Places {places} are visited in a round trip, each once. The way from"
      " (a,b) to (c,d) is |a-c| + |b-d| long. What is the length of the"
      " shortest round trip? Answer with an integer."
    ),
    answer=str(shortest),
    solution=f"""
import itertools
places = {places}
def length(order):
  trip = [places[0], *order, places[0]]
  return sum(abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(trip, trip[1:]))
print(min(length(order) for order in itertools.permutations(places[1:])))
""",
    work=5040 * count,
    shortcuts=(
      str(greedy + apart[here][0]),
      str(sum(apart[i][(i + 1) % count] for i in range(count))),
    ),
  )


def colourings(rng: random.Random) -> problems.Problem:
  """Colourings of a graph whose neighbours differ by enough."""
  count, colours = rng.randrange(7, 10), rng.randrange(4, 6)
  pairs = list(itertools.combinations(range(count), 2))
  edges = sorted(rng.sample(pairs, rng.randrange(count, 2 * count)))
  apart = rng.randrange(1, 3)
  neighbours = [
    [a if b == i else b for a, b in edges if i in (a, b)] for i in range(count)
  ]

  def ways(node, chosen):
    if node == count:
      return 1
    return sum(
      ways(node + 1, [*chosen, colour])
      for colour in range(colours)
      if all(
        abs(chosen[other] - colour) >= apart
        for other in neighbours[node]
        if other < node
      )
    )

  listed = ", ".join(f"{a}-{b}" for a, b in edges)
  return problems.Problem(
    kind="colourings",
    statement=(
      f"Nodes 0 to {count - 1} get numbers from 0 to {colours - 1} so that the"
      f" numbers of two nodes joined by an edge differ by at least {apart}. The"
      f" edges are {listed}. In how many ways can that be done? Answer with an"
      " integer."
    ),
    answer=str(ways(0, [])),
    solution=f"""
import numpy as np
edges, n, k = {edges}, {count}, {colours}
codes = np.arange(k ** n)
number = [codes // k ** i % k for i in range(n)]
good = np.ones(len(codes), bool)
for a, b in edges:
  good &= abs(number[a] - number[b]) >= {apart}
print(int(good.sum()))
""",
    work=colours**count // 16,
    shortcuts=(
      str(colours**count),
      str(colours * (colours - 1) ** (count - 1)),
    ),
  )


GENERATORS = (subsets, queens, paths, tour, colourings)
