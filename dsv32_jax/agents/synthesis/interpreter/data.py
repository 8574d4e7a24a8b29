"""Questions about files that are too long to read."""

import collections
import fractions
import hashlib
import random

from dsv32_jax.agents.synthesis.interpreter import problems

_PRODUCTS = ("bolts", "cables", "drills", "filters", "gauges", "hoses", "lamps")
_REGIONS = ("north", "south", "east", "west", "centre")


def orders(rng: random.Random) -> problems.Problem:
  """The customer of some rank by revenue under conditions."""
  count, customers = rng.randrange(300, 900), rng.randrange(25, 60)
  rows = [
    (
      f"C{rng.randrange(customers):03d}",
      rng.choice(_PRODUCTS),
      rng.choice(_REGIONS),
      rng.randrange(1, 13),
      rng.randrange(1, 40),
      rng.randrange(100, 20_000),
    )
    for _ in range(count)
  ]
  product, region = rng.choice(_PRODUCTS), rng.choice(_REGIONS)
  first = rng.randrange(1, 7)
  last, rank = first + rng.randrange(3, 6), rng.randrange(2, 9)
  revenue: collections.Counter[str] = collections.Counter()
  everything: collections.Counter[str] = collections.Counter()
  for customer, what, where, month, quantity, cents in rows:
    everything[customer] += quantity * cents
    if what != product and where != region and first <= month <= last:
      revenue[customer] += quantity * cents
  ordered = sorted(revenue.items(), key=lambda item: (-item[1], item[0]))
  naive = sorted(everything.items(), key=lambda item: (-item[1], item[0]))
  customer, cents = ordered[rank - 1]
  header = "customer,product,region,month,quantity,unit_price_cents\n"
  lines = (",".join(map(str, row)) + "\n" for row in rows)
  return problems.Problem(
    kind="orders",
    statement=(
      "The file orders.csv holds orders with a header. Take those of months"
      f" {first} to {last} whose product is not {product} and whose region is"
      f" not {region}. By revenue (quantity times unit price, summed), which"
      f" customer is number {rank}, the highest being number 1 and equal ones"
      " in the order of their names, and what is the revenue in cents? Answer"
      " as CUSTOMER,CENTS."
    ),
    answer=f"{customer},{cents}",
    files={"orders.csv": header + "".join(lines)},
    solution=f"""
import csv, sqlite3
base = sqlite3.connect(":memory:")
base.execute("CREATE TABLE o (c TEXT, p TEXT, r TEXT, m INT, q INT, u INT)")
with open("orders.csv", newline="") as file:
  rows = list(csv.reader(file))[1:]
base.executemany("INSERT INTO o VALUES (?, ?, ?, ?, ?, ?)", rows)
customer, cents = base.execute(
  "SELECT c, SUM(q * u) AS s FROM o WHERE p <> ? AND r <> ? AND m BETWEEN ?"
  " AND ? GROUP BY c ORDER BY s DESC, c LIMIT 1 OFFSET ?",
  ({product!r}, {region!r}, {first}, {last}, {rank - 1}),
).fetchone()
print(f"{{customer}},{{cents}}")
""",
    work=count * 6,
    shortcuts=tuple(f"{name},{total}" for name, total in (naive[rank - 1],)),
  )


def sessions(rng: random.Random) -> problems.Problem:
  """Visits in a log, split where a user pauses."""
  count, users = rng.randrange(500, 1500), rng.randrange(15, 40)
  gap = rng.randrange(300, 1800)
  time, events = 1_700_000_000 + rng.randrange(10**6), []
  for _ in range(count):
    time += rng.randrange(0, 120)
    events.append((time, f"user{rng.randrange(users):02d}", rng.randrange(200)))
  last: dict[str, int] = {}
  begun: dict[str, int] = {}
  visits = longest = 0
  for time, user, _ in events:
    if user not in last or time - last[user] > gap:
      visits, begun[user] = visits + 1, time
    last[user] = time
    longest = max(longest, time - begun[user])
  shuffled = rng.sample(events, len(events))
  log = "".join(f"{t} {u} /page/{p}\n" for t, u, p in shuffled)
  return problems.Problem(
    kind="sessions",
    statement=(
      "The file access.log has a line a request, in no order: seconds since"
      " 1970, user, page. A user's session ends where the user's next request"
      f" comes more than {gap} seconds later. How many sessions of all users"
      " are there, and how many seconds lie between the first and the last"
      " request of the longest? Answer with the two integers, separated by a"
      " comma."
    ),
    answer=f"{visits},{longest}",
    files={"access.log": log},
    solution=f"""
import itertools
with open("access.log") as file:
  rows = sorted((line.split()[1], int(line.split()[0])) for line in file)
lengths = []
for _, group in itertools.groupby(rows, key=lambda row: row[0]):
  times = [time for _, time in group]
  cuts = [i for i in range(1, len(times)) if times[i] - times[i - 1] > {gap}]
  for a, b in zip([0, *cuts], [*cuts, len(times)]):
    lengths.append(times[b - 1] - times[a])
print(f"{{len(lengths)}},{{max(lengths)}}")
""",
    work=count * 4,
    shortcuts=(f"{users},{gap}", f"{count},{gap}"),
  )


def words(rng: random.Random) -> problems.Problem:
  """Substrings of a text over few letters."""
  length, size = rng.randrange(1500, 5000), rng.randrange(4, 8)
  letters = "".join(rng.sample("ACGTXYZ", rng.randrange(3, 5)))
  weights = [rng.uniform(0.5, 2) for _ in letters]
  text = "".join(rng.choices(letters, weights, k=length))
  counts: dict[str, int] = {}
  for place in range(length - size + 1):
    part = text[place : place + size]
    counts[part] = counts.get(part, 0) + 1
  most = min(counts, key=lambda part: (-counts[part], part))
  once = sum(count == 1 for count in counts.values())
  lines = "\n".join(text[i : i + 60] for i in range(0, length, 60))
  return problems.Problem(
    kind="words",
    statement=(
      "The file text.txt holds one text over several lines; join them. Of its"
      f" substrings of length {size}, overlapping ones too: which occurs most"
      " often (of equal ones the first in the alphabet), how often, and how"
      " many different ones occur exactly once? Answer as"
      " SUBSTRING,COUNT,ONCE."
    ),
    answer=f"{most},{counts[most]},{once}",
    files={"text.txt": lines + "\n"},
    solution=f"""
import itertools
text = open("text.txt").read().replace("\\n", "")
parts = sorted(text[i:i + {size}] for i in range(len(text) - {size - 1}))
runs = [(len(list(group)), part) for part, group in itertools.groupby(parts)]
count, most = max(runs, key=lambda run: (run[0], [-ord(c) for c in run[1]]))
print(f"{{most}},{{count}},{{sum(n == 1 for n, _ in runs)}}")
""",
    work=length,
  )


def regression(rng: random.Random) -> problems.Problem:
  """A coefficient of a linear fit by least squares."""
  count, width = rng.randrange(60, 200), rng.randrange(2, 5)
  truth = [rng.randrange(-50, 51) for _ in range(width + 1)]
  table = []
  for _ in range(count):
    row = [rng.randrange(-100, 101) for _ in range(width)]
    noise = rng.randrange(-400, 401)
    table.append((row, truth[0] + _dot(truth[1:], row) + noise))
  asked = rng.randrange(width)
  kept = [(row, value) for row, value in table if row[0] % 5 != asked]
  matrix = [[1, *row] for row, _ in kept]
  normal = [
    [fractions.Fraction(_dot(a, b)) for b in zip(*matrix)] for a in zip(*matrix)
  ]
  right = [
    fractions.Fraction(_dot(column, [value for _, value in kept]))
    for column in zip(*matrix)
  ]
  found = _solved(normal, right)[asked + 1]
  names = [f"x{i}" for i in range(width)]
  lines = [",".join([*names, "y"])]
  lines += [",".join(map(str, [*row, value])) for row, value in table]
  return problems.Problem(
    kind="regression",
    statement=(
      f"The file table.csv has columns {', '.join(names)} and y. Leave out the"
      f" rows whose x0 modulo 5 is {asked} (modulo as in Python, so from 0 to"
      f" 4). Fit y = b + {' + '.join(f'a{i} * x{i}' for i in range(width))} to"
      f" the others by ordinary least squares. What is a{asked}? Answer with a"
      " decimal number of at least 8 significant digits."
    ),
    answer=repr(float(found)),
    tolerance=1e-6,
    files={"table.csv": "\n".join(lines) + "\n"},
    solution=f"""
import numpy as np
table = np.loadtxt("table.csv", delimiter=",", skiprows=1)
table = table[table[:, 0] % 5 != {asked}]
ones = np.ones((len(table), 1))
matrix = np.hstack([ones, table[:, :-1]])
fit, *_ = np.linalg.lstsq(matrix, table[:, -1], rcond=None)
print(repr(float(fit[{asked + 1}])))
""",
    work=count * (width + 1) ** 2,
    shortcuts=(str(truth[asked + 1]),),
  )


def _dot(a, b):
  return sum(x * y for x, y in zip(a, b))


def _solved(matrix, right):
  """Solves a system of equations in fractions, by elimination."""
  rows = [[*row, value] for row, value in zip(matrix, right)]
  for place in range(len(rows)):
    pivot = next(i for i in range(place, len(rows)) if rows[i][place])
    rows[place], rows[pivot] = rows[pivot], rows[place]
    rows[place] = [value / rows[place][place] for value in rows[place]]
    for other in range(len(rows)):
      if other != place:
        times = rows[other][place]
        pairs = zip(rows[other], rows[place])
        rows[other] = [a - times * b for a, b in pairs]
  return [row[-1] for row in rows]


def distance(rng: random.Random) -> problems.Problem:
  """The edit distance of two long words."""
  length, letters = rng.randrange(120, 300), "abcdefgh"[: rng.randrange(3, 8)]
  first = "".join(rng.choices(letters, k=length))
  second = list(first)
  for _ in range(rng.randrange(length // 3, length)):
    place = rng.randrange(len(second))
    change = rng.randrange(3)
    if change == 0:
      second[place] = rng.choice(letters)
    elif change == 1:
      second.insert(place, rng.choice(letters))
    elif len(second) > 1:
      del second[place]
  second = "".join(second)
  costs = [rng.randrange(2, 9) for _ in range(3)]
  swap, insert, delete = costs
  row = [insert * i for i in range(len(second) + 1)]
  for letter in first:
    before, row = row, [row[0] + delete]
    for j, other in enumerate(second):
      exchanged = before[j] + (0 if letter == other else swap)
      row.append(min(before[j + 1] + delete, row[j] + insert, exchanged))
  apart = sum(a != b for a, b in zip(first, second))
  return problems.Problem(
    kind="distance",
    statement=(
      "The file words.txt holds two words, one a line. The first is turned"
      f" into the second: to replace a letter costs {swap}, to insert one"
      f" {insert}, to delete one {delete}. What is the least cost? Answer with"
      " an integer."
    ),
    answer=str(row[-1]),
    files={"words.txt": f"{first}\n{second}\n"},
    solution=f"""
import heapq
first, second = open("words.txt").read().split()
n, m = len(first), len(second)
best, waiting = {{(0, 0): 0}}, [(0, 0, 0)]
while waiting:
  cost, i, j = heapq.heappop(waiting)
  if best[i, j] < cost:
    continue
  if (i, j) == (n, m):
    print(cost)
    break
  steps = []
  if i < n and j < m:
    steps.append((0 if first[i] == second[j] else {swap}, i + 1, j + 1))
  if i < n:
    steps.append(({delete}, i + 1, j))
  if j < m:
    steps.append(({insert}, i, j + 1))
  for more, *to in steps:
    if cost + more < best.get(tuple(to), 1 << 60):
      best[tuple(to)] = cost + more
      heapq.heappush(waiting, (cost + more, *to))
""",
    work=len(first) * len(second),
    shortcuts=(str(apart * swap), str(apart)),
  )


def digests(rng: random.Random) -> problems.Problem:
  """A chain of digests, each of the text of the one before."""
  word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=12))
  steps = rng.randrange(2_000, 20_000)
  zeros = rng.choice("0123456789abcdef")
  text, found = word, 0
  for _ in range(steps):
    text = hashlib.sha256(text.encode()).hexdigest()
    found += text.startswith(zeros)
  return problems.Problem(
    kind="digests",
    statement=(
      f"Begin with the text {word}. {steps} times, replace the text by the"
      " lower-case hexadecimal SHA-256 digest of its ASCII bytes. What are the"
      " first 12 characters of the last digest, and how many of all digests"
      f" begin with {zeros}? Answer as CHARACTERS,COUNT."
    ),
    answer=f"{text[:12]},{found}",
    solution=f"""
import hashlib, itertools
step = lambda data, _: hashlib.new("sha256", data).digest().hex().encode()
links = itertools.accumulate(range({steps}), step, initial={word.encode()!r})
chain = list(links)
count = sum(link[:1] == {zeros.encode()!r} for link in chain[1:])
print(f"{{chain[-1][:12].decode()}},{{count}}")
""",
    work=steps,
    shortcuts=(
      f"{hashlib.sha256(word.encode()).hexdigest()[:12]},{steps // 16}",
    ),
  )


GENERATORS = (orders, sessions, words, regression, distance, digests)
