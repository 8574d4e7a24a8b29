"""Reads a task's text and tools, as a policy that knows nothing else may.

No solution, verifier or database is looked at: only the user's message and
the tools' schemas.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import re
from typing import Any

from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import conditions

_VALUES = r"(?P<value>.+)"
_COMPARISONS = tuple(
  (
    op,
    re.compile(
      "^" + wording.format(label="(?P<label>.+)", value=_VALUES) + "$"
    ),
  )
  for op, wordings in conditions.WORDINGS.items()
  for wording in wordings
)
_ASKS = {
  "find": re.compile(
    r"Find the one (?P<target>\w+) that .* its (?P<label>.+)\."
  ),
  "extreme": re.compile(
    r"Among the (?P<target>\w+) that .* the (?P<order>highest|lowest)"
    r" (?P<label>.+), and tell"
  ),
  "total": re.compile(
    r"Count the (?P<target>\w+) that .* up their (?P<label>.+?)\."
  ),
  "ranking": re.compile(
    r"List the (?P<target>\w+) that .* by (?P<order>\w+)ending (?P<label>.+?)\."
  ),
  "bundle": re.compile(
    r"Choose (?P<size>\d+) (?P<target>\w+), .* Their (?P<label>.+) must add up"
    r" to (?P<budget>\d+) at most\. .* exceeds (?P<limit>\d+), then the"
    r" (?P<standard>.+) of every one of them must be at least"
    r" (?P<required>[\d.]+)\."
  ),
}
_DAY_RULE = re.compile(
  r"On day (\d), .*? less than (\d+) CNY, both restaurants must have at least"
  r" ([\d.]+) stars, and the ticket must cost less than (\d+) CNY\. .*? must"
  r" have ([\d.]+) stars or more, and the ticket must cost less than (\d+)"
  r" CNY\. .*? must have ([\d.]+) stars or more\."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
  """A condition as it was read; `least` belongs to rows below."""

  scope: str
  table: str
  column: str
  op: str
  value: Any
  least: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ways:
  """What tools tell about a table.

  Attributes:
    parent: table that the lister wants a row of; None at the root.
    lister: the tool that lists it.
    informers: tools that tell about one row.
  """

  parent: str | None
  lister: protocol.ToolSchema
  informers: Sequence[protocol.ToolSchema]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What was understood of a task."""

  kind: str
  target: str
  wishes: tuple[Wish, ...]
  details: Mapping[str, str]
  ways: Mapping[str, Ways]
  answer_keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TripTask:
  """What was understood of a trip."""

  days: tuple[str, str, str]
  first_city: str
  rules: Mapping[int, tuple[float, ...]]
  hours: float
  total: float
  dry: bool


def read(start: protocol.Start) -> Task | TripTask | None:
  """Returns what the text asks for, or None where it is not understood."""
  text, _, schema = start.observation.partition("\n\nSubmit the answer")
  if "It takes three days" in text:
    return _read_trip(text)
  head = text.split("\n")[0]
  ways = _read_tools(start.tools)
  for kind, pattern in _ASKS.items():
    found = pattern.search(head)
    if found is None:
      continue
    details = found.groupdict()
    target = _table(details["target"], ways)
    bullets = re.findall(r"^\(\d+\) (.+)$", text, re.MULTILINE)
    schema = json.loads(schema[schema.index("{") :])
    return Task(
      kind=kind,
      target=target,
      wishes=tuple(_read_wish(bullet, target, ways) for bullet in bullets),
      details=details,
      ways=ways,
      answer_keys=tuple(schema["properties"]),
    )
  return None


def column(label: str) -> str:
  """Returns the name of a column whose label stands in a text."""
  return label.replace(" ", "_")


def _read_tools(tools) -> dict[str, Ways]:
  listers, informers = {}, {}
  for tool in tools:
    listed = re.match(r"Lists every (\w+)(?: of one (\w+))?", tool.description)
    told = re.match(r"Tells .* about one (\w+)\.", tool.description)
    if listed:
      listers[listed[1]] = (listed[2], tool)
    elif told:
      informers.setdefault(told[1], []).append(tool)
  return {
    table: Ways(parent=parent, lister=tool, informers=informers.get(table, ()))
    for table, (parent, tool) in listers.items()
  }


def _table(noun, ways):
  """Finds the table of a noun, singular or plural, by the tools' names."""
  if noun in ways:
    return noun
  for table, way in ways.items():
    if re.search(rf"_{noun}(_by_|$)", way.lister.name):
      return table
  return noun


def _read_wish(text, target, ways):
  above = re.match(r"belonging to an? (\w+) with (.+)$", text)
  below = re.match(r"has (\d+) or more (\w+) with (.+)$", text)
  if above:
    scope, table, least, rest = "above", above[1], 1, above[2]
  elif below:
    scope, table = "below", _table(below[2], ways)
    least, rest = int(below[1]), below[3]
  else:
    scope, table, least, rest = "own", target, 1, text
  for op, pattern in _COMPARISONS:
    found = pattern.match(rest)
    if found:
      return Wish(
        scope=scope,
        table=table,
        column=column(found["label"]),
        op=op,
        value=_value(op, found["value"]),
        least=least,
      )
  return Wish(scope=scope, table=table, column="", op="eq", value=rest)


def _value(op, text):
  return float(text.split(" ")[0]) if op in ("ge", "le") else text


def _read_trip(text):
  days = re.findall(r"from ([\d-]+) to ([\d-]+), and begins in ([^;]+);", text)
  first, last, city = days[0]
  hours = re.search(r"may take ([\d.]+) hours", text)
  total = re.search(r"together must cost at most (\d+) CNY", text)
  return TripTask(
    days=(first, f"{first[:-2]}{int(first[-2:]) + 1:02d}", last),
    first_city=city,
    rules={
      int(rule[0]): tuple(float(value) for value in rule[1:])
      for rule in _DAY_RULE.findall(text)
    },
    hours=float(hours[1]) if hours else float("inf"),
    total=float(total[1]) if total else float("inf"),
    dry="It must not rain" in text,
  )
