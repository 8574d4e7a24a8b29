"""Questions about what a process with exact rules comes to."""

import itertools
import math
import random

from dsv32_jax.agents.synthesis.interpreter import problems

_SEQUENCE = problems.SEQUENCE


def automaton(rng: random.Random) -> problems.Problem:
  """Live cells of an elementary cellular automaton on a ring."""
  width, steps = rng.randrange(101, 400), rng.randrange(150, 900)
  # Rules that neither die out nor settle.
  rule = rng.choice((18, 22, 30, 45, 54, 60, 73, 90, 105, 110, 122, 126, 150))
  seed = problems.draw_seed(rng)
  drawn = itertools.islice(problems.numbers(seed), width)
  cells = sum((x % 2) << place for place, x in enumerate(drawn))
  start, full = cells, (1 << width) - 1
  for _ in range(steps):
    # Bit i holds cell i: its left neighbour is bit i - 1.
    left = (cells << 1 | cells >> width - 1) & full
    right = cells >> 1 | (cells & 1) << width - 1
    after = 0
    for pattern in range(8):
      if rule >> pattern & 1:
        alike = full
        for bit, side in ((4, left), (2, cells), (1, right)):
          alike &= side if pattern & bit else full & ~side
        after |= alike
    cells = after
  places = sum(i for i in range(width) if cells >> i & 1)
  return problems.Problem(
    kind="automaton",
    statement=(
      f"{_SEQUENCE.format(seed=seed)} Cells 0 to {width - 1} lie on a ring;"
      f" cell i is alive if x(i+1) is odd. They follow the elementary cellular"
      f" automaton of rule {rule} (Wolfram's numbering, the left neighbour of"
      f" cell i is cell i-1). After {steps} steps, how many cells are alive and"
      " what is the sum of their numbers? Answer with the two integers,"
      " separated by a comma."
    ),
    answer=f"{cells.bit_count()},{places}",
    solution=problems.SEQUENCE_CODE
    + f"""
import itertools
n = {width}
cells = [x % 2 for x in itertools.islice(numbers({seed}), n)]
for _ in range({steps}):
  cells = [
    {rule} >> (4 * cells[i - 1] + 2 * cells[i] + cells[(i + 1) % n]) & 1
    for i in range(n)
  ]
print(f"{{sum(cells)}},{{sum(i for i in range(n) if cells[i])}}")
""",
    work=width * steps,
    shortcuts=(
      f"{start.bit_count()},{sum(i for i in range(width) if start >> i & 1)}",
    ),
  )


def ant(rng: random.Random) -> problems.Problem:
  """Where a turmite on a torus ends, and what it leaves."""
  width, height = rng.randrange(20, 60), rng.randrange(20, 60)
  steps = rng.randrange(5_000, 40_000)
  turns = "".join(rng.choice("RL") for _ in range(rng.randrange(2, 6)))
  if len(set(turns)) == 1:
    turns = "RL" + turns
  colours: dict[complex, int] = {}
  place, heading = complex(0, 0), complex(0, -1)
  for _ in range(steps):
    colour = colours.get(place, 0)
    heading *= 1j if turns[colour] == "R" else -1j
    colours[place] = (colour + 1) % len(turns)
    place += heading
    place = complex(place.real % width, place.imag % height)
  changed = sum(colour != 0 for colour in colours.values())
  return problems.Problem(
    kind="ant",
    statement=(
      f"A torus of {width} columns and {height} rows has cells of colours 0 to"
      f" {len(turns) - 1}, all 0 at first. An ant on column 0, row 0 heads"
      " north (row numbers grow southwards). In each step it turns by the"
      f" colour c of its cell, by letter c (from 0) of {turns} (R: to the"
      f" right, L: to the left), changes that colour to (c+1) mod {len(turns)},"
      f" and moves one cell ahead, around the edges. After {steps} steps: its"
      " column, its row, and how many cells are not of colour 0? Answer with"
      " the three integers, separated by commas."
    ),
    answer=f"{int(place.real)},{int(place.imag)},{changed}",
    solution=f"""
width, height, turns = {width}, {height}, {turns!r}
grid = [[0] * width for _ in range(height)]
moves = [(0, -1), (1, 0), (0, 1), (-1, 0)]
x = y = way = 0
for _ in range({steps}):
  colour = grid[y][x]
  way = (way + (1 if turns[colour] == "R" else 3)) % 4
  grid[y][x] = (colour + 1) % len(turns)
  x, y = (x + moves[way][0]) % width, (y + moves[way][1]) % height
print(f"{{x}},{{y}},{{sum(c != 0 for row in grid for c in row)}}")
""",
    work=steps,
    shortcuts=(f"0,0,{changed}", f"0,0,{min(steps, width * height)}"),
  )


def queue(rng: random.Random) -> problems.Problem:
  """Waiting in line before a few counters."""
  servers, customers = rng.randrange(1, 5), rng.randrange(400, 3000)
  gap = rng.randrange(20, 90)
  service = int(gap * servers * rng.uniform(1.6, 2.0))
  seed = problems.draw_seed(rng)
  drawn = problems.numbers(seed)
  free = [0] * servers
  time = waited = longest = 0
  for _ in range(customers):
    time += 1 + next(drawn) % gap
    duration = 1 + next(drawn) % service
    counter = min(range(servers), key=free.__getitem__)
    begin = max(time, free[counter])
    waited, longest = waited + begin - time, max(longest, begin - time)
    free[counter] = begin + duration
  return problems.Problem(
    kind="queue",
    statement=(
      f"{_SEQUENCE.format(seed=seed)} {customers} customers come to a shop with"
      f" {servers} equal counter(s). Customer k (from 0) comes"
      f" 1 + (x(2k+1) mod {gap}) seconds after the one before, the first that"
      " long after time 0, and is served for"
      f" 1 + (x(2k+2) mod {service}) seconds. They form one line, are served in"
      " the order they came, each as soon as a counter is free. How many"
      " seconds do all of them wait in line together, and how many does the"
      " one who waits longest? Answer with the two integers, separated by a"
      " comma."
    ),
    answer=f"{waited},{longest}",
    solution=problems.SEQUENCE_CODE
    + f"""
import heapq
drawn = numbers({seed})
arrivals, time = [], 0
for _ in range({customers}):
  time += 1 + next(drawn) % {gap}
  arrivals.append((time, 1 + next(drawn) % {service}))
busy, waits = [], []
for time, duration in arrivals:
  begin = time
  if len(busy) == {servers}:
    begin = max(time, heapq.heappop(busy))
  waits.append(begin - time)
  heapq.heappush(busy, begin + duration)
print(f"{{sum(waits)}},{{max(waits)}}")
""",
    work=2 * customers,
    shortcuts=("0,0",),
  )


def orbit(rng: random.Random) -> problems.Problem:
  """Three bodies that attract each other, by the leapfrog scheme."""
  steps, step = rng.randrange(400, 2500), rng.choice((0.001, 0.002, 0.004))
  bodies = []
  for number in range(3):
    angle = 2 * math.pi * (number + rng.uniform(-0.2, 0.2)) / 3
    radius, speed = rng.uniform(1.5, 2.5), rng.uniform(0.3, 0.7)
    mass = round(rng.uniform(0.5, 1.5), 2)
    place = (radius * math.cos(angle), radius * math.sin(angle))
    motion = (-speed * math.sin(angle), speed * math.cos(angle))
    bodies.append((mass, *(round(v, 3) for v in (*place, *motion))))
  places = [list(body[1:3]) for body in bodies]
  motions = [list(body[3:5]) for body in bodies]

  def kick(duration):
    for i, j in itertools.permutations(range(3), 2):
      gap = [places[j][axis] - places[i][axis] for axis in (0, 1)]
      pull = bodies[j][0] / math.hypot(*gap) ** 3
      for axis in (0, 1):
        motions[i][axis] += duration * pull * gap[axis]

  for _ in range(steps):
    kick(step / 2)
    for place, motion in zip(places, motions):
      for axis in (0, 1):
        place[axis] += step * motion[axis]
    kick(step / 2)
  apart = math.hypot(*(a - b for a, b in zip(places[0], places[1])))
  begin = math.dist(bodies[0][1:3], bodies[1][1:3])
  listed = "; ".join(
    f"mass {m}, place ({x}, {y}), velocity ({u}, {v})"
    for m, x, y, u, v in bodies
  )
  return problems.Problem(
    kind="orbit",
    statement=(
      "Three bodies in a plane attract each other by Newton's law with G = 1:"
      f" A, B and C with {listed}. Integrate {steps} steps of {step} by"
      " leapfrog in its kick-drift-kick form (half a step of velocities, a"
      " step of places, half a step of velocities). What is the distance of A"
      " and B then? Answer with a decimal number of at least 8 significant"
      " digits."
    ),
    answer=repr(apart),
    tolerance=1e-6,
    solution=f"""
import numpy as np
bodies = np.array({[list(b) for b in bodies]})
mass, place, motion = bodies[:, 0], bodies[:, 1:3], bodies[:, 3:5]
def pull():
  gap = place[None] - place[:, None]
  cube = (gap ** 2).sum(-1) ** 1.5 + np.eye(3)
  return (mass[None, :, None] * gap / cube[..., None]).sum(1)
for _ in range({steps}):
  motion = motion + {step} / 2 * pull()
  place = place + {step} * motion
  motion = motion + {step} / 2 * pull()
print(repr(float(np.hypot(*(place[0] - place[1])))))
""",
    work=6 * steps,
    shortcuts=(repr(begin),),
  )


def recurrence(rng: random.Random) -> problems.Problem:
  """Two numbers that follow each other modulo a prime."""
  prime = rng.choice((999_983, 1_000_003, 1_299_709, 15_485_863, 32_452_843))
  a, b, c, d = (rng.randrange(2, 1000) for _ in range(4))
  u, v = rng.randrange(prime), rng.randrange(prime)
  steps = rng.randrange(20_000, 200_000)
  x, y = u, v
  for _ in range(steps):
    x, y = (a * x * x + b * y + 1) % prime, (c * x * y + d) % prime
  return problems.Problem(
    kind="recurrence",
    statement=(
      f"Let u(0) = {u}, v(0) = {v}, u(n+1) = ({a}*u(n)^2 + {b}*v(n) + 1) mod"
      f" {prime} and v(n+1) = ({c}*u(n)*v(n) + {d}) mod {prime}. What is"
      f" (u({steps}), v({steps}))? Answer with the two integers, separated by a"
      " comma."
    ),
    answer=f"{x},{y}",
    solution=f"""
seen, states = {{}}, []
state, n = ({u}, {v}), {steps}
while state not in seen and len(states) <= n:
  seen[state] = len(states)
  states.append(state)
  x, y = state
  state = (
    ({a} * pow(x, 2, {prime}) + {b} * y + 1) % {prime},
    ({c} * x * y + {d}) % {prime},
  )
if n >= len(states):
  begin = seen[state]
  n = begin + (n - begin) % (len(states) - begin)
print(f"{{states[n][0]}},{{states[n][1]}}")
""",
    work=steps,
    shortcuts=(f"{u},{v}",),
  )


GENERATORS = (automaton, ant, queue, orbit, recurrence)
