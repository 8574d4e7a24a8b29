"""Scripts of a model that writes an environment of a few lamps and rooms."""

import json

from dsv32_jax.agents import policy as policies

FILL = """python3 - <<'END'
import sqlite3
connection = sqlite3.connect("lamps.sqlite")
connection.execute("CREATE TABLE room (name TEXT, floor INTEGER)")
connection.execute("CREATE TABLE lamp (name TEXT, room TEXT, watts INTEGER)")
for number in range(6):
  connection.execute(
    "INSERT INTO room VALUES (?, ?)", (f"room {number}", number % 3))
  for place in range(4):
    connection.execute("INSERT INTO lamp VALUES (?, ?, ?)", (
      f"lamp {number}{place}", f"room {number}",
      SHIFT + (37 * number + 11 * place) % 90))
connection.commit()
END
"""
OBJECT = {"type": "object", "additionalProperties": False}


def parameters(**properties):
  return {**OBJECT, "properties": properties, "required": list(properties)}


TOOLS = {
  "get_rooms": (
    parameters(floor={"type": "integer"}),
    "def get_rooms(floor):\n"
    "  rows = query('SELECT name FROM room WHERE floor = ?', floor)\n"
    "  return [row[0] for row in rows]\n",
  ),
  "get_lamps": (
    parameters(room={"type": "string"}),
    "def get_lamps(room):\n"
    "  rows = query('SELECT name, watts FROM lamp WHERE room = ?', room)\n"
    "  return [{'name': name, 'watts': watts} for name, watts in rows]\n",
  ),
}
SCHEMA = parameters(
  lamps={"type": "array", "items": {"type": "string"}},
  watts={"type": "integer"},
)
# Over the rooms of one floor, then of all.
SOLUTION = """def solve():
  best, found = -1, []
  for floor in {floors}:
    for room in get_rooms(floor=floor):
      for lamp in get_lamps(room=room):
        if lamp["watts"] > best:
          best, found = lamp["watts"], [lamp["name"]]
  return {{"lamps": found, "watts": best}}
"""
VERIFIER = """def verify(answer):
  rows = query(
    "SELECT lamp.name, watts FROM lamp JOIN room ON room.name = lamp.room"
    " WHERE floor IN {floors} ORDER BY watts DESC LIMIT 1")
  return answer["lamps"] == [rows[0][0]] and answer["watts"] == rows[0][1]
"""


def say(tool_name, /, **arguments):
  return policies.call(tool_name, json.dumps(arguments), reasoning="I go on.")


def tool(name, /, **changes):
  found, source = TOOLS[name]
  given = {
    "name": name,
    "description": f"Tells what {name} says.",
    "parameters": found,
    "source": source,
  }
  return say("set_tool", **{**given, **changes})


def proposal(floors=(0,), **changes):
  given = {
    "statement": f"Which lamp on the floors {floors} has the most watts?",
    "answer_schema": SCHEMA,
    "solution": SOLUTION.format(floors=list(floors)),
    "verifier": VERIFIER.format(floors=f"({', '.join(map(str, floors))})"),
    "wrong_answers": [
      {"lamps": [f"lamp {n}0"], "watts": 1000 + n} for n in range(5)
    ],
  }
  return say("propose_task", **{**given, **changes})


def begin(shift=5):
  """The data and both tools."""
  return [
    say("shell", command=FILL.replace("SHIFT", str(shift))),
    say("take_database", path="lamps.sqlite"),
    tool("get_rooms"),
    tool("get_lamps"),
  ]


def whole(shift=5):
  """An environment with one task of two levels."""
  return [
    *begin(shift),
    proposal(),
    proposal((0, 1, 2)),
    say("next_task"),
    say("finish"),
  ]


def solver(messages):
  """Solves a task of `whole` as an agent does, by its text and the tools."""
  results = [m["content"] for m in messages if m["role"] == "tool"]
  text = next(m["content"] for m in messages if m["role"] == "user")
  floors = [int(c) for c in text.partition("?")[0] if c.isdigit()]
  calls = [say("get_rooms", floor=floor) for floor in floors]
  rooms = [r for text in results[: len(floors)] for r in json.loads(text)]
  if len(results) >= len(floors):
    calls += [say("get_lamps", room=room) for room in rooms]
  if len(results) < len(calls):
    return calls[len(results)]
  lamps = [x for text in results[len(floors) :] for x in json.loads(text)]
  best = max(lamps, key=lambda lamp: lamp["watts"])
  answer = {"lamps": [best["name"]], "watts": best["watts"]}
  return say("submit_result", answer_text=json.dumps(answer))
